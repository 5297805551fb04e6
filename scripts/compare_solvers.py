"""Compare the solvers on the bundled model, and print the table of docs/results.md.

    python scripts/compare_solvers.py

The weight error alone does not rank solvers, so this script measures the perplexity on the held-out
modules of the standard library, with axis 1, groups of 64 and everything in fp32. `hqq 0.2.8` is
the installed library itself; `rtn`, `hqq` and `least_squares` are the solvers of this project.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path

import torch
from hqq.core.quantize import Quantizer
from tabulate import tabulate
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import hqqtrain
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.quant.error import error_ratio, squared_error
from hqqtrain.quant.quantize import dequantize_weight, quantize_weight
from hqqtrain.quant.spec import QuantSpec

MODEL = Path(hqqtrain.__file__).parent / "models" / "tiny"
NBITS, GROUP_SIZE, SEQUENCE = (8, 4, 3, 2, 1), 64, 512

Approximation = Callable[[Tensor, int], Tensor]
"""(weight, nbits) -> the weight after quantizing and dequantizing, fp32."""


def by_library(W: Tensor, nbits: int) -> Tensor:
    """Quantize and dequantize W with the installed hqq, in fp32 on the CPU."""
    W_q, meta = Quantizer.quantize(
        W, nbits=nbits, group_size=GROUP_SIZE, axis=1, round_zero=nbits == 4, device="cpu",
        compute_dtype=torch.float32, bitpack=False,
    )  # fmt: skip
    return ((W_q.float() - meta["zero"]) * meta["scale"]).reshape(W.shape)


def by_solver(name: str) -> Approximation:
    """Return the approximation by one of our solvers, with scale and zero in fp32 as in hqq."""

    def approximate(W: Tensor, nbits: int) -> Tensor:
        spec = QuantSpec(nbits, GROUP_SIZE, 1, name, torch.float32)
        return dequantize_weight(quantize_weight(W, spec), spec.layout(*W.shape), torch.float32)

    return approximate


SOLVERS: dict[str, Approximation] = {
    "rtn": by_solver("rtn"),
    "hqq 0.2.8": by_library,
    "hqq": by_solver("hqq"),
    "least_squares": by_solver("least_squares"),
}


def approximate_model(
    model: nn.Module, approximate: Approximation, nbits: int
) -> tuple[nn.Module, float]:
    """Return a copy of `model` with every linear but the head approximated, and their error.

    The error is the relative error over all of these weights together.
    """
    model, errors, norms = copy.deepcopy(model), 0.0, 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            W = approximate(module.weight.data, nbits)
            error, norm = squared_error(module.weight.data, W).tolist()
            errors, norms = errors + error, norms + norm
            module.weight.data = W
    return model, error_ratio(errors, norms)


def main() -> None:
    """Print the perplexities and the relative errors of all solvers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of held-out text")
    parser.add_argument("--nbits", type=int, nargs="+", default=NBITS, choices=NBITS)
    options = parser.parse_args()

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = load_eval_set(EvalConfig(tokens=options.tokens), DataConfig(), tokenizer, SEQUENCE)
    assert text is not None
    processes = Communicator(0, 1, torch.device("cpu"))

    def perplexity(model: nn.Module) -> float:
        return evaluate_perplexity(model, text, processes, batch_size=8).perplexity

    full, perplexities, errors = perplexity(model), [], []
    for name, approximate in SOLVERS.items():
        results = [approximate_model(model, approximate, nbits) for nbits in options.nbits]
        perplexities.append([name, *(perplexity(approximated) for approximated, _ in results)])
        errors.append([name, *(error for _, error in results)])
    bits = [f"{nbits}-bit" for nbits in options.nbits]
    print(f"Perplexity (full precision: {full:.3f})\n")
    print(tabulate(perplexities, ["solver", *bits], tablefmt="github", floatfmt=",.5g"))
    print("\nRelative weight error, ||W - W'||^2 / ||W||^2\n")
    print(tabulate(errors, ["solver", *bits], tablefmt="github", floatfmt=".3g"))


if __name__ == "__main__":
    main()
