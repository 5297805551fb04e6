"""Train the LoRA adapters of a model with fused blocks, where they exist: see `nn.lora_blocks`.

Blocks replace the `forward` of single modules. PEFT's modules, their parameters and their names
stay, so saving and loading know nothing of blocks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers.activations import ACT2FN

from hqqtrain.models.families.registry import FAMILIES, layer_names
from hqqtrain.models.families.structure import find_decoder_layers, text_config
from hqqtrain.models.fqn import strip_wrappers
from hqqtrain.nn.lora_blocks import AdapterCasts, GatedMLPBlock, SharedInputBlock
from hqqtrain.nn.lora_blocks.adapted_linear import AdaptedLinear, adapted_linear
from hqqtrain_kernels.glu import Activation

_GATED_MLPS = (
    "LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "GemmaMLP", "Gemma2MLP",
    "Gemma3MLP",
)  # fmt: skip
"""MLPs of transformers that compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""

_MLP_ENDS_LAYER = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""Families whose decoder layers add the output of the MLP to the residual and end there."""

_ACTIVATIONS: dict[type[nn.Module], Activation] = {
    type(ACT2FN["silu"]): "silu",
    type(ACT2FN["gelu_pytorch_tanh"]): "gelu_tanh",
}


@dataclass(frozen=True)
class FusedLora:
    """The number of linears with LoRA in decoder layers that blocks compute, and the others.

    Attributes:
        blocks: Roles of the linears in a block, such as `q|k|v` -> number of such blocks.
        plain: Reason why PEFT's own path computes a linear -> number of such linears.
        casts: Casts the adapters of the blocks, once per step inside of its context.
    """

    blocks: Counter[str] = field(default_factory=Counter)
    plain: Counter[str] = field(default_factory=Counter)
    casts: AdapterCasts = field(default_factory=AdapterCasts)

    def __str__(self) -> str:
        fused = ", ".join(f"{number} x {roles}" for roles, number in self.blocks.items())
        plain = ", ".join(f"{number} ({reason})" for reason, number in self.plain.items())
        text = f"LoRA: fused blocks: {fused or 'none'}"
        return f"{text}; linears on PEFT's path: {plain}" if plain else text


def fuse_lora(model: nn.Module, undo: ExitStack | None = None) -> FusedLora:
    """Let blocks compute the linears with LoRA in the decoder layers of `model` in training.

    A block computes the same as PEFT's modules, with fewer passes over memory. What it cannot
    compute, such as dropout, stays as it is, and so does every call without gradients.

    Args:
        model: The model with adapters, as the strategy has wrapped it; changed in place.
        undo: Takes the changes back when it is closed; None: they stay.
    """
    result = FusedLora()
    for layer in find_decoder_layers(model) or ():
        modules: dict[str, nn.Module] = {}
        for name, module in layer.named_modules():
            modules.setdefault(strip_wrappers(name), module)  # a wrapper comes before its inside
        linears = _adapted_linears(modules, result.plain)
        for roles in _groups(model, layer, modules, linears):
            if len(roles) == 3 and "down" in roles:
                _fuse_mlp(model, modules, roles, linears, result.casts, undo)
            else:
                SharedInputBlock([linears.pop(n) for n in roles.values()], result.casts, undo)
            result.blocks["|".join(roles)] += 1
        for name, linear in linears.items():
            SharedInputBlock([linear], result.casts, undo)
            result.blocks[name.rpartition(".")[2]] += 1
    return result


def _adapted_linears(
    modules: Mapping[str, nn.Module], plain: Counter[str]
) -> dict[str, AdaptedLinear]:
    """Return name -> linear for those that a block can compute; count the others in `plain`."""
    linears = {}
    for name, module in modules.items():
        if isinstance(module, LoraLinear):
            linear = adapted_linear(module)
            if isinstance(linear, str):
                plain[linear] += 1
            else:
                linears[name] = linear
    return linears


def _groups(
    model: nn.Module, layer: nn.Module, modules: Mapping[str, nn.Module],
    linears: Mapping[str, AdaptedLinear],
) -> Iterator[dict[str, str]]:  # fmt: skip
    """Yield role -> name of linears that one block computes; empty for an unknown family."""
    if text_config(model).model_type not in FAMILIES:
        return
    names = layer_names(model, layer)
    for roles in (("q", "k", "v"), ("gate", "up", "down"), ("gate", "up")):
        found = {role: getattr(names, role) for role in roles}
        group = {role: name for role, name in found.items() if name in linears}
        if len(set(group.values())) < len(group):
            continue  # the linears are fused already, as in Phi-3
        if "down" in roles:
            if len(group) == 3 and _activation(modules, group) is not None:
                yield group
        elif len(group) > 1:
            yield group


def _fuse_mlp(
    model: nn.Module, modules: Mapping[str, nn.Module], roles: Mapping[str, str],
    linears: dict[str, AdaptedLinear], casts: AdapterCasts, undo: ExitStack | None,
) -> None:  # fmt: skip
    """Build the block of an MLP, and remove its linears from `linears`."""
    activation = _activation(modules, roles)
    assert activation is not None
    GatedMLPBlock(
        modules[_parent(roles["down"])],
        *(linears.pop(roles[role]) for role in ("gate", "up", "down")),
        activation=activation,
        ends_layer=text_config(model).model_type in _MLP_ENDS_LAYER,
        casts=casts,
        undo=undo,
    )


def _activation(modules: Mapping[str, nn.Module], roles: Mapping[str, str]) -> Activation | None:
    """Return the activation of the MLP around `roles`; None if a block cannot compute the MLP."""
    mlp = modules[_parent(roles["down"])]
    is_known = type(mlp).__module__.startswith("transformers.models.")
    if not is_known or type(mlp).__name__ not in _GATED_MLPS or "forward" in vars(mlp):
        return None
    return next((name for kind, name in _ACTIVATIONS.items() if type(mlp.act_fn) is kind), None)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
