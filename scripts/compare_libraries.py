"""Print a table of hqqtrain beside hqq, llm-compressor (GPTQ) and AutoRound.

    pip install llmcompressor auto-round
    python scripts/compare_libraries.py smollm2 --text texts/code --calibration texts/prose

All quantize the same weights, every linear but the head, with groups of 64 and float or integer
zeros as they do by default. Those that calibrate see the same token ids. `compare_quality.py`
measures hqqtrain, and this script measures the others with the same function on the same held-out
text. A library that is not installed has no rows.

The weights of the other libraries are dequantized, so that no kernel of theirs is part of the
comparison. GPTQ uses its activation order, and AutoRound its own 200 steps on each layer.
"""

import argparse
import itertools
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compare_quality import figures, run_product
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.packing import encode_stream
from hqqtrain.data.texts import training_texts
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.tasks.calibration import spread_sequences

GROUP_SIZE, LENGTH = 64, 512
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADER = ("quantized by", "bits", "perplexity", "KL", "top-1", "seconds", "peak GiB")

Quantizer = Callable[[nn.Module, Any, int, Tensor], nn.Module]
"""(model, tokenizer, nbits, calibration token ids [sequences, length]) -> the quantized model."""


def by_hqq(model: nn.Module, tokenizer: Any, nbits: int, sequences: Tensor) -> nn.Module:
    """Quantize by hqq, without text, as its `BaseQuantizeConfig` does."""
    from hqq.core.quantize import Quantizer as HQQ

    for module in _linears(model):
        W_q, meta = HQQ.quantize(
            module.weight.data, nbits=nbits, group_size=GROUP_SIZE, axis=1, device=str(DEVICE),
            compute_dtype=torch.float32, bitpack=False,
        )  # fmt: skip
        W = ((W_q.float() - meta["zero"]) * meta["scale"]).reshape(module.weight.shape)
        module.weight.data = W.to(module.weight.dtype)
    return model


def by_llm_compressor(model: nn.Module, tokenizer: Any, nbits: int, sequences: Tensor) -> nn.Module:
    """Quantize by the `GPTQModifier` of llm-compressor."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(
        num_bits=nbits, group_size=GROUP_SIZE, strategy="group", symmetric=False, actorder="weight"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    ones = torch.ones_like(sequences)
    data = Dataset.from_dict({"input_ids": sequences.tolist(), "attention_mask": ones.tolist()})
    return oneshot(
        model=model, tokenizer=tokenizer, dataset=data,
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=sequences.shape[1], num_calibration_samples=len(sequences),
        shuffle_calibration_samples=False,
    )  # fmt: skip


def by_auto_round(model: nn.Module, tokenizer: Any, nbits: int, sequences: Tensor) -> nn.Module:
    """Quantize by AutoRound with its default steps."""
    from auto_round import AutoRound

    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)}
               for part in sequences.split(8)]  # fmt: skip
    quantizer = AutoRound(
        model, tokenizer=tokenizer, scheme=f"W{nbits}A16", group_size=GROUP_SIZE, sym=False,
        dataset=batches, nsamples=len(sequences), seqlen=sequences.shape[1],
        device_map=str(DEVICE), enable_torch_compile=False,
    )  # fmt: skip
    quantized, _ = quantizer.quantize()
    return quantized


LIBRARIES: dict[str, tuple[str, Quantizer]] = {
    "hqq": ("hqq", by_hqq),
    "GPTQ of llm-compressor": ("llmcompressor", by_llm_compressor),
    "AutoRound": ("auto_round", by_auto_round),
}
"""Name in the table -> the module to import, and the function that quantizes with it."""


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", help="folder of a model")
    add("--text", default="python_stdlib", help="source whose held-out part is measured")
    add(
        "--calibration",
        required=True,
        help="source of the calibration text; of --text, the other part",
    )
    add("--nbits", type=int, nargs="+", default=[4, 3, 2])
    add("--tokens", type=int, default=65536, help="held-out tokens that are measured")
    add("--calibration-tokens", type=int, default=65536)
    add("--only", nargs="+", choices=["hqqtrain", *LIBRARIES], help="the rows to run")
    return parser.parse_args(words)


def main() -> int:
    """Run all rows, and print the table."""
    options = parse_arguments()
    wanted = options.only or ["hqqtrain", *LIBRARIES]
    table: list[list[Any]] = []
    for name, nbits in itertools.product(wanted, options.nbits):
        if name == "hqqtrain":
            row = _by_hqqtrain(options, nbits)
        elif find_spec(LIBRARIES[name][0]):
            row = measure(LIBRARIES[name][1], options, nbits)
        else:
            print(f"{name} is not installed", file=sys.stderr)
            break
        table.append([name, nbits, *row])
        print(*table[-1], sep="\t", file=sys.stderr, flush=True)
    formats = ("", "", ",.4g", ".4f", ".4f", ".1f", ".2f")
    print(tabulate(table, HEADER, tablefmt="github", floatfmt=formats, missingval="-"))
    return 0


def measure(quantize: Quantizer, options: argparse.Namespace, nbits: int) -> list[float | None]:
    """Return the figures of a library, in the order of `HEADER`."""
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = calibration_sequences(options, tokenizer)
    model = _load(options.model)
    _reset_peak()
    begin = time.monotonic()
    quantized = quantize(model, tokenizer, nbits, sequences)
    seconds, peak = time.monotonic() - begin, _peak_gib()
    text = load_eval_set(
        EvalConfig(tokens=options.tokens), DataConfig(source=options.text), tokenizer, LENGTH
    )
    assert text is not None
    result = evaluate_perplexity(
        quantized.to(DEVICE), text, Communicator(0, 1, DEVICE), batch_size=8,
        reference=_load(options.model),
    )  # fmt: skip
    assert result.reference_perplexity is not None
    share = result.perplexity / result.reference_perplexity
    return [share, result.kl, result.top1_agreement, seconds, peak]


def calibration_sequences(options: argparse.Namespace, tokenizer: Any) -> Tensor:
    """Return the token ids that `quant.calibration` of hqqtrain would choose, [sequences, 512]."""
    data = DataConfig(source=options.calibration)
    # A text of its own is used as a whole, as in the product.
    held_out = "auto" if options.calibration == options.text else None
    texts = training_texts(data, EvalConfig(source=held_out))
    tokens = encode_stream(texts, tokenizer, data, "--calibration", lambda: None, None)
    return torch.from_numpy(spread_sequences(tokens.stream, options.calibration_tokens, None))


def _by_hqqtrain(options: argparse.Namespace, nbits: int) -> list[float | None]:
    words = [
        "task=eval", f"model.name_or_path={options.model}", f"data.source={options.text}",
        f"quant.calibration={options.calibration}", f"quant.nbits={nbits}",
        f"quant.calibration_tokens={options.calibration_tokens}", "track.backends=[]",
        f"quant.group_size={GROUP_SIZE}", f"eval.tokens={options.tokens}",
        f"train.max_seq_len={LENGTH}",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as root:
        result = run_product(words, Path(root))
    if isinstance(result, str):
        raise SystemExit(result)
    return figures(result)


def _linears(model: nn.Module) -> list[nn.Linear]:
    return [module for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"]  # fmt: skip


def _load(folder: str) -> nn.Module:
    model: Any  # the stubs of transformers know no `to`
    dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.to(DEVICE).eval()


def _reset_peak() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak_gib() -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else None


if __name__ == "__main__":
    sys.exit(main())
