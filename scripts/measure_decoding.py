"""Measure the time of one new token: quantized models beside bf16, compiled in the same way.

    python scripts/measure_decoding.py bf16 4 2 4:head 2:head 4:torchao 4:gemlite
    python scripts/measure_decoding.py 2 --shape 70b

Each word is a model with random weights in the shape of a Llama: `bf16`, or the bits of ours, with
`:head` for an output head of 8 bits, `:plain` without `prepare_for_inference`, and `:torchao`,
`:gemlite` or `:humming` for the kernels of another package. The tokens are generated as
task=generate does it: a step is the model and the choice of the most likely token, in one CUDA
graph.
"""

import argparse
import gc
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hqqtrain.config.quant import QuantConfig
from hqqtrain.generation.static_decoder import StaticDecoder
from hqqtrain.inference.backends.registry import BACKENDS
from hqqtrain.inference.prepare import prepare_for_inference
from hqqtrain.nn.replace import quantize_model

GROUP_SIZE = 64


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and of the measurement."""

    hidden_size: int = 4096
    intermediate_size: int = 14336
    layers: int = 32
    heads: int = 32
    key_heads: int = 8
    vocabulary: int = 128256
    cache: int = 512
    tokens: int = 64


SHAPES = {
    "8b": Sizes(),
    "70b": Sizes(
        hidden_size=8192, intermediate_size=28672, layers=80, heads=64, vocabulary=32000
    ),
}  # fmt: skip
"""Llama 3 8B and Llama 2 70B."""


def build_model(word: str, sizes: Sizes, device: str) -> Any:
    """Return the model that a word of the command line names."""
    config = LlamaConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads, vocab_size=sizes.vocabulary,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    bits, _, option = word.partition(":")
    if bits != "bf16":
        quant = QuantConfig(nbits=int(bits), group_size=GROUP_SIZE, solver="rtn", calibration=None)
        if option == "head":
            quant.skip, quant.overrides = [], {"lm_head": {"nbits": 8}}
        quantize_model(model, quant)
    model.to_empty(device=device)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for name, parameter in model.named_parameters():
        _fill(name.rpartition(".")[2], parameter.data)
    if bits != "bf16" and option != "plain":
        prepare_for_inference(model, option if option in BACKENDS else "auto")
    return model


def _fill(name: str, tensor: Tensor) -> None:
    """Fill a parameter with numbers of the usual size."""
    if tensor.dtype == torch.uint8:
        tensor.random_(0, 256)
    elif name in ("scale", "zero") or tensor.dim() == 1:
        tensor.fill_({"scale": 0.01, "zero": 1.5}.get(name, 1.0))
    else:
        tensor.normal_(0, 0.02)


class Stopwatch:
    """Receives tokens, as `ReplyStreamer` does, and notes when they come."""

    has_ended = False

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def measure(model: Any, sizes: Sizes) -> float:
    """Return the seconds of one new token."""
    config = GenerationConfig(do_sample=False)
    decoder = StaticDecoder(model, config, sizes.cache)
    prompt = torch.randint(0, sizes.vocabulary, (1, 16))
    watch: Any = Stopwatch()
    for _ in range(2):
        watch = Stopwatch()
        decoder.generate(model, prompt, sizes.tokens, watch)
    first = 8  # the prompt, and some tokens until the graph runs ahead of the CPU
    return (watch.times[-1] - watch.times[first]) / (len(watch.times) - 1 - first)


@torch.no_grad()
def main(arguments: list[str]) -> int:
    """Measure the models that the command line names, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("models", nargs="+", help="bf16, or bits such as 4, 2:head or 4:torchao")
    parser.add_argument("--shape", choices=SHAPES, default="8b", help="sizes of the Llama")
    parser.add_argument("--layers", type=int, help="decoder layers, if not those of the shape")
    parsed = parser.parse_args(arguments)
    sizes = SHAPES[parsed.shape]
    sizes = replace(sizes, layers=parsed.layers or sizes.layers)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[list[Any]] = []
    for word in parsed.models:
        model = build_model(word, sizes, device)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        milliseconds = 1e3 * measure(model, sizes)
        peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else float("nan")
        first = rows[0][1] if rows else milliseconds
        rows.append([word, milliseconds, 1e3 / milliseconds, first / milliseconds, peak])
        sys.stderr.write(f"{word}: {milliseconds:.3f} ms\n")
        del model
        torch._dynamo.reset()
    header = ["model", "ms per token", "tokens/s", "times the first", "GiB"]
    print(tabulate(rows, header, floatfmt=("", ".2f", ".1f", ".2f", ".1f")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
