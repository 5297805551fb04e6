"""Measure the time of one new token: quantized models beside bf16, compiled in the same way.

    python scripts/measure_decoding.py bf16 int4 4 2 4:head 2:head

Each word is a model with random weights in the shape of an 8B Llama: `bf16`; `int4`, the kernel of
gpt-fast and torchao (tinygemm, groups of 64); or the bits of ours, with `:head` for an output head
of 8 bits, and `:plain` without `prepare_for_inference`. The tokens are generated as task=generate
does it: a step is the model and the choice of the most likely token, in one CUDA graph.
"""

import argparse
import gc
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hqqtrain.config.quant import QuantConfig
from hqqtrain.generation.static_decoder import StaticDecoder
from hqqtrain.inference.grouped_attention import use_grouped_attention
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


class TinygemmLinear(nn.Module):
    """A linear layer of 4 bits with PyTorch's own kernel, W = (q - 8) * scale + zero."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        groups = weight.float().unflatten(1, (-1, GROUP_SIZE))
        low, high = groups.amin(-1), groups.amax(-1)
        scale = (high - low).clamp_min(1e-6) / 15
        codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15)
        codes = codes.flatten(1).to(torch.int32)
        packed = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
        self.out_features = len(weight)
        self.codes = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
        pairs = torch.stack([scale.t(), (low + 8 * scale).t()], -1)
        self.scale_and_zero = pairs.to(torch.bfloat16).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        y = torch.ops.aten._weight_int4pack_mm(rows, self.codes, GROUP_SIZE, self.scale_and_zero)
        return y.view(*x.shape[:-1], self.out_features)


def build_model(word: str, sizes: Sizes, device: str) -> Any:
    """Return the model that a word of the command line names."""
    config = LlamaConfig(
        hidden_size=sizes.hidden_size, intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads, vocab_size=sizes.vocabulary,
        max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model: Any = LlamaForCausalLM(config).bfloat16().eval().requires_grad_(False)
    kind, _, option = word.partition(":")
    if kind == "int4":
        for name, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and name != "lm_head":
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, TinygemmLinear(linear.weight))
        use_grouped_attention(model)
    elif kind != "bf16":
        quant = QuantConfig(nbits=int(kind), group_size=GROUP_SIZE, solver="rtn", calibration=None)
        if option == "head":
            quant.skip, quant.overrides = [], {"lm_head": {"nbits": 8}}
        quantize_model(model, quant)
        if option != "plain":
            prepare_for_inference(model)
    return model


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
    parser.add_argument("models", nargs="+", help="bf16, int4, or bits such as 4 or 2:head")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[list[Any]] = []
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="decoder layers")
    parsed = parser.parse_args(arguments)
    sizes = Sizes(layers=parsed.layers)
    for word in parsed.models:
        model = build_model(word, sizes, device)
        gc.collect()
        seconds = measure(model, sizes)
        sys.stderr.write(f"{word}: {1e3 * seconds:.3f} ms\n")
        first = rows[0][1] if rows else 1e3 * seconds
        rows.append([word, 1e3 * seconds, 1 / seconds, first / (1e3 * seconds)])
        torch._dynamo.reset()
    header = ["model", "ms per token", "tokens/s", "times the first"]
    print(tabulate(rows, header, floatfmt=("", ".2f", ".1f", ".2f")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
