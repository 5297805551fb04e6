"""The inputs of `bench_training.py`: the shape of a Llama, a tokenizer, and texts of token ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "8b": LLAMA_8B,
    "70b": LLAMA_8B | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
                       "num_attention_heads": 64},
    "small": LLAMA_8B | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096},
}  # fmt: skip
"""Llama 3 8B and 70B, and a model for a CPU."""


@dataclass(frozen=True)
class Workload:
    """The work of a step, the same for all contenders.

    Attributes:
        folder: Has `config.json`, a tokenizer and `data.jsonl`; peers save weights there.
        batch: Sequences of a step.
        tokens: Tokens of a sequence.
        checkpointing: `train.activation_checkpointing`.
        options: Further settings of hqqtrain.
    """

    folder: Path
    batch: int
    tokens: int
    checkpointing: str
    options: tuple[str, ...] = ()


def write_inputs(folder: Path, shape: str, workload: Workload) -> None:
    """Write the configuration, a tokenizer and the token ids that are trained on.

    The sequences of `data.jsonl` are full. Those of `documents.jsonl` consist of documents, whose
    lengths have a median of 300 tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    sizes = SHAPES[shape]
    LlamaConfig(
        **sizes, max_position_embeddings=max(8192, workload.tokens), tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    vocabulary = {letter: i for i, letter in enumerate(["<s>", "</s>", "<pad>", "<unk>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)  # fmt: skip
    total = 64 * workload.batch * workload.tokens
    full = [workload.tokens] * (total // workload.tokens)
    _write_texts(folder / "data.jsonl", full, sizes["vocab_size"])
    generator = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < total:
        length = int(generator.lognormal(np.log(300), 1))
        lengths.append(min(workload.tokens, max(8, length)))
    _write_texts(folder / "documents.jsonl", lengths, sizes["vocab_size"])


def _write_texts(path: Path, lengths: list[int], vocabulary: int) -> None:
    """Write texts of random token ids."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for length in lengths:
            ids = generator.integers(10, vocabulary, length).tolist()
            file.write(json.dumps({"input_ids": ids}) + "\n")
