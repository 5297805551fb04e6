"""`load_hqq_lora`: an adapter that the hqq library has saved."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.api.adapters import add_lora
from hqqtrain.api.arguments import named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.config.public_function import public_function
from hqqtrain.models.foreign.qmodel import convert_pickle
from hqqtrain.nn.base_linears import BaseLinear, base_linears

_WHAT = "an adapter that hqq's PeftUtils.save_lora_weights writes"
_ADVICE = "Save it again with hqq, or train a new adapter."


@public_function(model=nn.Module)
def load_hqq_lora(model: PreTrainedModel, file: str | os.PathLike[str]) -> PeftModel:
    """Put an adapter that hqq's `PeftUtils.save_lora_weights` has saved on a quantized model.

    The file is a pickle. A process of its own reads it, which runs none of its code. It does not
    record its base: the model must be the one on which the adapter was trained, such as an hqq
    checkpoint that `task=quantize` has taken over.

    Args:
        model: A quantized model of transformers, without adapters; changed in place.
        file: The file.

    Returns:
        PEFT's model, with the ranks and scalings that hqq had, in evaluation mode.

    Raises:
        UserError: The file cannot be read, the adapter does not fit the model, or it has trained
            more than LoRA matrices.
    """
    with named_as_arguments("load_hqq_lora"):
        states, linears = _read(Path(file)), base_linears(model)
        for name, state in states.items():
            _check(f"{file}: {name}", state, linears.get(name))
        ranks = {name: state["lora_A"].shape[1] for name, state in states.items()}
        alphas = {name: state["scaling"].item() * ranks[name] for name, state in states.items()}
        adapted = add_lora(
            model, target_modules=[*states], rank_pattern=ranks, alpha_pattern=alphas,
            r=max(ranks.values()), alpha=max(alphas.values()),
        )  # fmt: skip
        for name, state in states.items():
            layer: Any = model.get_submodule(name)
            _copy(layer.lora_A["default"].weight, state["lora_A"])
            _copy(layer.lora_B["default"].weight, state["lora_B"])
    return adapted.eval()


def _read(file: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer: module -> name -> tensor."""
    states: dict[str, dict[str, Tensor]] = {}
    if not file.is_file():
        raise UserError(f"file={file}: no such file.")
    with TemporaryDirectory(prefix="hqqtrain-") as folder:
        convert_pickle(file, Path(folder), _WHAT, _ADVICE)
        for part in Path(folder).glob("*.safetensors"):
            for full_name, tensor in load_file(part).items():
                module, _, name = full_name.rpartition(".")
                states.setdefault(module, {})[name] = tensor
    if not states:
        raise UserError(f"file={file}: has no adapter.")
    return states


def _check(where: str, state: dict[str, Tensor], linear: BaseLinear | None) -> None:
    """Check that the adapter of a layer fits it.

    Raises:
        UserError: It does not, or it is more than LoRA.
    """
    if linear is None:
        raise UserError(f"{where}: is no quantized layer of the model; load the base of hqq.")
    if not {"lora_A", "lora_B", "scaling"} <= state.keys():
        raise UserError(f"{where}: has {', '.join(sorted(state))}, and no LoRA; it is not read.")
    A, B, bias = state["lora_A"], state["lora_B"], state.get("bias")
    shape = (linear.in_features, linear.out_features)
    if A.dim() != 2 or B.dim() != 2 or A.shape[1] != B.shape[0] or (len(A), B.shape[1]) != shape:
        raise UserError(
            f"{where}: has lora_A {[*A.shape]} and lora_B {[*B.shape]}; a layer of {shape[1]} x "
            f"{shape[0]} has [{shape[0]}, r] and [r, {shape[1]}]."
        )
    expected = torch.zeros(shape[1]) if linear.bias is None else linear.bias.detach().float().cpu()
    if bias is not None and not torch.allclose(bias.float(), expected, rtol=1e-2, atol=1e-4):
        raise UserError(f"{where}: has a trained bias (train_bias), which PEFT's LoRA has not.")


@torch.no_grad()
def _copy(weight: Tensor, transposed: Tensor) -> None:
    weight.copy_(transposed.T)
