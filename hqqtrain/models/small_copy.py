"""Build a small copy of an architecture: the same code and kinds of layers, with narrow layers.

Some properties of a model follow from its code and configuration alone, such as whether texts in
one sequence see each other. A copy of a few megabytes shows them in a fraction of a second on a
CPU, before any weight is read. No table of families is needed: a copy keeps all numbers of heads
and groups and divides all widths by the same factor, so that they still fit together.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from hqqtrain.models.families.structure import find_decoder_layers

VOCABULARY = 512
"""Largest vocabulary of a copy."""

WINDOW = 8
"""Largest attention window, chunk of a recurrence and number of selected keys of a copy."""

_FACTORS = (16, 8, 4, 2, 1)
"""Factors by which widths may be divided."""

_MIN_HEAD_DIM = 8
_MIN_HIDDEN = 64
_MIN_WIDTH = 32
_MAX_EXPERTS = 16
_MAX_EXPERTS_PER_TOKEN = 8
_ALIGNMENT = 4  # products of grouped matrices need rows of whole 16 bytes
_MAX_LAYERS = 12
_MAX_PARAMETERS = 80_000_000

_WINDOWS = re.compile(
    r"(?<!keep_)window(_size|_len)?$|chunk_(size|length)$|^local_attention$|^index_topk$"
)
_EXPERTS = re.compile(r"^(num_|n_|moe_num_)?(local_|routed_)?experts$|^zero_expert_num$")
_EXPERTS_PER_TOKEN = re.compile(r"experts_per_tok|^moe_(topk|k)$")
_LAYERS = re.compile(r"layers?$|num_blocks$")
_NO_WIDTHS = re.compile(
    r"id$|^(num|n)_(?!embd|inner)|^(moe|swa|linear|encoder|decoder|mamba)_(num|n)_|layers?$|blocks?$|"
    r"(?<!d_)(?<!dim_)heads?$|position|seq_len|length|context|bucket|distance|factor|seed|window|"
    r"chunk|interval|period|offset|index_(start|end)|cycles|topk|floor|extent|block_size|"
    r"expert_num|multiple|type|ngram|beam|source|target|kernel|scale|alpha|beta|patch|_k$"
)
"""Names of integers in a configuration that are no widths."""


def small_copies(hf_config: PretrainedConfig, model: nn.Module) -> Iterator[PreTrainedModel]:
    """Yield small copies of an architecture in fp32, on the CPU and in evaluation mode.

    The first copy is the smallest one. A caller that can call it needs no other. A copy whose
    constructor fails is left out, because not all widths can be divided by every factor.

    Every copy has layers of every kind that `model` has, and random weights that are large enough
    to make every layer change the logits. The random state of the process does not change.

    Args:
        hf_config: The configuration of the model.
        model: The model, which may be on the meta device. It shows how its layers differ.
    """
    layers = find_decoder_layers(model) or ()
    depths = dict.fromkeys([_layers_of_every_kind(layers), len(layers)])
    for depth in depths:
        for factor in _factors(hf_config):
            try:
                yield _build(_small_config(hf_config, factor, len(layers), depth))
            except _NoCopyError:
                continue


class _NoCopyError(Exception):
    """No copy of this size can be built."""


def _build(config: PretrainedConfig) -> PreTrainedModel:
    """Build the model of `config` with large random weights."""
    try:
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        if sum(parameter.numel() for parameter in skeleton.parameters()) > _MAX_PARAMETERS:
            raise _NoCopyError
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            model = model.float().eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            return model
    except Exception as error:  # constructors raise any error if sizes do not fit together
        raise _NoCopyError from error


def _layers_of_every_kind(layers: Any) -> int:
    """Return the number of layers, from the first one on, that contain every kind of layer."""
    first_of_kind: dict[Any, int] = {}
    for index, layer in enumerate(layers):
        first_of_kind.setdefault(tuple(_describe(layer)), index)
    last = max(first_of_kind.values(), default=0)
    return min(max(2, last + 1), _MAX_LAYERS, len(layers))


def _describe(layer: nn.Module) -> Iterator[tuple]:
    """Yield name, class, and all settings that are no numbers, of every module in a layer."""
    for name, module in layer.named_modules():
        settings = tuple(
            (key, value)
            for key, value in vars(module).items()
            if isinstance(value, str | bool) and not key.startswith("_") and key != "training"
        )
        yield name, type(module).__name__, settings


def _factors(hf_config: PretrainedConfig) -> Iterator[int]:
    """Yield the factors that leave the model and its heads wide enough, the largest first."""
    text = hf_config.get_text_config(decoder=True)
    hidden, heads, head_dim = (
        _integer(text, name) for name in ("hidden_size", "num_attention_heads", "head_dim")
    )
    hidden = hidden or 1024
    head_dim = head_dim or hidden // (heads or 16)
    for factor in _FACTORS:
        is_wide_enough = head_dim // factor >= _MIN_HEAD_DIM and hidden // factor >= _MIN_HIDDEN
        if factor == 1 or (head_dim % factor == 0 and is_wide_enough):
            yield factor


def _integer(config: PretrainedConfig, name: str) -> int:
    """Return an attribute of `config`, or 0 if it is no number."""
    try:
        value = getattr(config, name, None)
    except Exception:  # an attribute that differs between layers raises an error of transformers
        return 0
    return value if type(value) is int else 0


def _small_config(
    hf_config: PretrainedConfig, factor: int, num_layers: int, depth: int
) -> PretrainedConfig:
    """Return a copy of `hf_config`, and of the ones inside it, with small values.

    Args:
        hf_config: The configuration of a model.
        factor: Divides all widths.
        num_layers: The number of decoder layers in `hf_config`.
        depth: The number of decoder layers to keep.
    """
    small = copy.deepcopy(hf_config)
    configs = [small]
    for config in configs:
        for name, value in vars(config).items():
            if isinstance(value, PretrainedConfig):
                configs.append(value)  # the loop visits it, too
            elif isinstance(value, list) and len(value) == num_layers:
                vars(config)[name] = [_small_value(name, v, factor) for v in value[:depth]]
            elif _LAYERS.search(name) and value == num_layers:
                vars(config)[name] = depth
            elif name in ("rope_parameters", "rope_scaling"):
                _shrink_rope(value, factor)
            else:
                vars(config)[name] = _small_value(name, value, factor)
    return small


def _small_value(name: str, value: Any, factor: int) -> Any:
    """Return the value of an attribute of a configuration in that of a copy."""
    if name.endswith("token_id") and isinstance(value, list):
        return [_small_value(name, token, factor) for token in value]
    if type(value) is not int:
        return value
    if name.endswith("token_id"):
        return min(value, VOCABULARY - 1)
    if "vocab" in name:
        return min(value, VOCABULARY)
    if _EXPERTS.search(name):
        return min(value, _MAX_EXPERTS)
    if _EXPERTS_PER_TOKEN.search(name):
        return min(value, _MAX_EXPERTS_PER_TOKEN)
    if _WINDOWS.search(name):
        return min(value, WINDOW)
    if value >= _MIN_WIDTH and not _NO_WIDTHS.search(name):
        width, rest = divmod(value, factor)
        return width if rest == 0 else -(-width // _ALIGNMENT) * _ALIGNMENT + _ALIGNMENT
    return value


def _shrink_rope(rope: Any, factor: int) -> None:
    """Shrink the lists in `rope`, whose lengths or sums are half the width of a head."""
    for name, value in rope.items() if isinstance(rope, dict) else ():
        if name == "mrope_section":
            rope[name] = [max(1, width // factor) for width in value]
        elif isinstance(value, list):
            rope[name] = value[: max(1, len(value) // factor)]
        else:
            _shrink_rope(value, factor)
