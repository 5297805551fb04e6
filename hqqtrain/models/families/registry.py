"""Names of the linears and experts in a decoder layer, by family of models.

The table contains the families that are tested. For other models the names come from an inspection
of their layers, because the names of linears follow a few conventions.
"""

from dataclasses import asdict, dataclass, replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from hqqtrain.models.families.structure import text_config
from hqqtrain.models.fqn import is_adapter, strip_wrappers
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import fused_experts


@dataclass(frozen=True)
class LayerNames:
    """Names of the parts of a decoder layer, relative to the layer; None if it has no such part.

    A fused linear has several roles: the `self_attn.qkv_proj` of Phi-3 is `q`, `k` and `v`.

    Attributes:
        q: Linear that computes the queries.
        k: Linear that computes the keys.
        v: Linear that computes the values.
        o: Linear that computes the output of the attention.
        gate: Linear whose output gates that of `up`, in an MLP with a gate.
        up: Linear from the residual stream to the inner width of the MLP.
        down: Linear from the inner width of the MLP to the residual stream.
        experts: Module with the experts: an `nn.ModuleList`, or one with 3-D parameters
            [experts, ...]. A layer with experts may have no `gate`, `up` and `down`.
    """

    q: str | None = None
    k: str | None = None
    v: str | None = None
    o: str | None = None
    gate: str | None = None
    up: str | None = None
    down: str | None = None
    experts: str | None = None

    @property
    def fused(self) -> dict[str, tuple[str, ...]]:
        """Name -> roles of the linears that have several roles."""
        roles: dict[str, tuple[str, ...]] = {}
        for role, name in asdict(self).items():
            if name is not None:
                roles[name] = (*roles.get(name, ()), role)
        return {name: its_roles for name, its_roles in roles.items() if len(its_roles) > 1}


_LLAMA = LayerNames(
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)

# Some layers of Qwen's models have a dense MLP instead of experts.
_MIXTURE_OF_EXPERTS = replace(_LLAMA, experts="mlp.experts")

FAMILIES: dict[str, LayerNames] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_vl_text": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "mixtral": _MIXTURE_OF_EXPERTS,
    "qwen2_moe": _MIXTURE_OF_EXPERTS,
    "qwen3_moe": _MIXTURE_OF_EXPERTS,
    "phi3": LayerNames(
        **dict.fromkeys(("q", "k", "v"), "self_attn.qkv_proj"),
        o="self_attn.o_proj",
        **dict.fromkeys(("gate", "up"), "mlp.gate_up_proj"),
        down="mlp.down_proj",
    ),
    "gpt2": LayerNames(
        **dict.fromkeys(("q", "k", "v"), "attn.c_attn"),
        o="attn.c_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    ),
    "gpt_neox": LayerNames(
        **dict.fromkeys(("q", "k", "v"), "attention.query_key_value"),
        o="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
    ),
}
"""`model_type` of the text configuration -> names in all layers of the family."""

# Roles of a linear, separated by spaces, by the last part of its name.
_ATTENTION_ROLES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    **dict.fromkeys(("qkv_proj", "query_key_value", "c_attn", "Wqkv"), "q k v"),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj"), "o"),
}
_MLP_ROLES = {
    "gate_proj": "gate",
    "gate_up_proj": "gate up",
    **dict.fromkeys(("up_proj", "c_fc", "fc1", "fc_in", "dense_h_to_4h"), "up"),
    **dict.fromkeys(("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h"), "down"),
}


def layer_names(model: nn.Module, layer: nn.Module) -> LayerNames:
    """Return the names of the linears and experts in `layer`, from the table or by inspection.

    Args:
        model: Causal language model; it may be wrapped, adapted, quantized or on meta.
        layer: One of its decoder layers. The layers of a model may differ.
    """
    family = FAMILIES.get(text_config(model).model_type)
    if family is None:
        return inspect_layer(layer)
    existing = {strip_wrappers(name) for name, _ in layer.named_modules()}
    names = asdict(family).items()
    return LayerNames(**{role: name for role, name in names if name in existing})


def inspect_layer(layer: nn.Module) -> LayerNames:
    """Return the names of the linears and experts in a decoder layer of an unknown family.

    The attention is a module whose name contains `att`. Cross-attention, and MLPs that belong to
    experts, are left out. If several modules have a role, the first one gets it.
    """
    names: dict[str, str] = {}  # role -> name
    for full_name, module in layer.named_modules():
        name = strip_wrappers(full_name)
        parent, _, last_part = name.rpartition(".")
        if last_part == "experts":
            names.setdefault("experts", name)
        is_linear = isinstance(module, nn.Linear | Conv1D | HQQLinear)
        if not is_linear or is_adapter(name) or "expert" in name or "cross" in name:
            continue
        roles = _ATTENTION_ROLES if "att" in parent.lower() else _MLP_ROLES
        for role in roles.get(last_part, "").split():
            names.setdefault(role, name)
    # Experts that are one 3-D parameter: the module is the parent of the parameter.
    for parameter_name in fused_experts(layer):
        names.setdefault("experts", parameter_name.rpartition(".")[0])
    return LayerNames(**names)
