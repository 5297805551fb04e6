"""Attention of texts that share a row, without a mask.

transformers builds a mask [rows, 1, tokens, tokens] for such rows, and PyTorch then computes every
product of two tokens in a row, also of two texts. Here all rows of a batch are one sequence of
documents. `torch.nn.attention.varlen` computes the attention of each document on a GPU. Elsewhere,
documents of the same length that follow one another are a batch.

The lengths of the documents are an argument of the model, which passes it down to its layers. So
they are made once for a batch, and a layer that is recomputed in the backward pass gets the same.
"""

import inspect
import logging
from contextlib import ExitStack
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from hqqtrain.common.errors import describe_error
from hqqtrain.compat import attn_implementation, can_set_attention
from hqqtrain.models.families.structure import text_config
from hqqtrain.models.fqn import base_model
from hqqtrain.models.small_copy import small_copies
from hqqtrain_kernels.autocast import product_dtype

logger = logging.getLogger(__name__)

NAME = "hqqtrain_varlen"
"""The name of this attention in transformers' configurations."""

MAX_HEAD_DIM = 256
"""Largest head that the kernel supports; its width is also a multiple of 8."""

PROBED_LENGTHS = (11, 1, 13, 12, 13)
"""Tokens of the documents in the two rows of a test; most are longer than a copy's windows."""

TOLERANCE = 1e-2
"""Largest difference between equal logits, as a share of their standard deviation."""

_GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether grouped queries must be asked for; PyTorch 2.11 computes them without."""


class Documents(NamedTuple):
    """The documents of a batch, in the order of its rows. Every token is in one of them.

    Attributes:
        bounds: int32 [documents + 1], where each document starts in the flattened batch, and where
            the last one ends; on the device of the model.
        longest: The length of the longest document in tokens, which the host must know.
    """

    bounds: Tensor
    longest: int

    @classmethod
    def from_lengths(cls, lengths: Tensor, device: torch.device) -> "Documents":
        """Return the documents of these lengths, int64 [documents] on the CPU."""
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        torch.cumsum(lengths, 0, out=bounds[1:])
        return cls(bounds.to(device, non_blocking=True), int(lengths.max()))


def packed_arguments(lengths: Tensor, device: torch.device) -> dict[str, Any]:
    """Return the arguments of a model that uses `NAME` for a batch with documents.

    transformers builds no mask if it gets one with four dimensions, and passes that to the layers.
    This one is a placeholder: `varlen_attention` ignores it.

    Args:
        lengths: int64 [documents] on the CPU, the lengths of the documents of all rows.
        device: The device of the model.
    """
    placeholder = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
    return {
        "attention_mask": placeholder,
        "documents": Documents.from_lengths(lengths, device),
    }


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention inside each document; without documents, what `sdpa` does.

    Args:
        module: The attention block.
        query: [rows, heads, tokens, head_dim].
        key: [rows, key heads, tokens, head_dim].
        value: [rows, key heads, tokens, width].
        attention_mask: A mask, if there are no documents.
        dropout: Probability of a dropped weight.
        scaling: Factor of the products; None: 1 / sqrt(head_dim).
        documents: The documents of the batch.
        sliding_window: The number of tokens that a token sees, itself included; None: all.
        **kwargs: Further arguments of transformers.

    Returns:
        The output [rows, tokens, heads, width], and None for the weights.

    Raises:
        NotImplementedError: The model needs attention of another kind; see `find_obstacle`.
    """
    if documents is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling,
            sliding_window=sliding_window, **kwargs,
        )  # fmt: skip
    _refuse_other_kinds(dropout, kwargs)
    rows, _, tokens, _ = query.shape
    bounds, longest = documents
    window = sliding_window if sliding_window and sliding_window < longest else None
    if window is None and len(bounds) == rows + 1 and longest == tokens:
        return sdpa_attention_forward(module, query, key, value, None, scaling=scaling)
    query, key, value = (_flatten(x) for x in (query, key, value))
    attend = _attend_varlen if _has_kernel(query, value) else _attend_runs
    output = attend(query, key, value, documents, scaling, window)
    return output.unflatten(0, (rows, tokens)), None


def _refuse_other_kinds(dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what changes the attention and is not computed here."""
    changes = ("softcap", "s_aux", "position_bias")
    others = [name for name in changes if kwargs.get(name) is not None]
    if dropout:
        others.append("attention dropout")
    if kwargs.get("is_causal") is False:
        others.append("attention that is not causal")
    if others:
        raise NotImplementedError(f"needs {', '.join(others)}")


def _flatten(x: Tensor) -> Tensor:
    """Return [rows, heads, tokens, width] as [rows * tokens, heads, width], in autocast's dtype."""
    return x.to(product_dtype(x)).transpose(1, 2).flatten(0, 1)


def _has_kernel(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    fits = width == value.shape[-1] and width % 8 == 0 and width <= MAX_HEAD_DIM
    return fits and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents,
    scaling: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Return the output [tokens, heads, width] of a kernel that gets the bounds of documents."""
    bounds, longest = documents
    options: dict[str, Any] = {"enable_gqa": True} if _GROUPED else {}
    output = varlen_attn(
        query, key, value, bounds, bounds, longest, longest, scale=scaling,
        window_size=(-1 if window is None else window - 1, 0), **options,
    )  # fmt: skip
    assert isinstance(output, Tensor)  # a pair only if more is asked for
    return output


def _attend_runs(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents,
    scaling: float | None, window: int | None,
) -> Tensor:  # fmt: skip
    """Return the output [tokens, heads, width], with a call for each run of equal lengths."""
    lengths = documents.bounds.diff().tolist()
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    parts = zip(*(x.split(sizes) for x in (query, key, value)), strict=True)
    outputs = []
    for (length, count), part in zip(runs, parts, strict=True):
        q, k, v = (x.unflatten(0, (count, length)).transpose(1, 2) for x in part)
        mask = _window_mask(length, window, q.device) if window and length > window else None
        output = sdpa(q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Return bool [length, length]: whether a token sees another one at most `window` - 1 back."""
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance
    return (distance >= 0) & (distance < window)


def use_packed_attention(model: nn.Module, undo: ExitStack | None = None) -> str:
    """Let a model of transformers use `varlen_attention` wherever a batch has documents.

    Args:
        model: May be wrapped or sharded. It uses `sdpa` now.
        undo: Lets the model use `sdpa` again when it is closed; None: the change stays.

    Returns:
        Why it does not, as the rest of a sentence that begins with the model; empty if it does.
    """
    base = base_model(model)
    _register()
    reason = find_obstacle(base)
    if not reason:
        if undo is not None:
            undo.callback(base.set_attn_implementation, str(attn_implementation(base.config)))
        base.set_attn_implementation(NAME)
    return reason


def uses_packed_attention(model: nn.Module) -> bool:
    """Whether `use_packed_attention` has changed a model, which may be wrapped."""
    return attn_implementation(base_model(model).config) == NAME


def find_obstacle(model: PreTrainedModel) -> str:
    """Return why a model cannot use `varlen_attention`; empty if it can.

    Whether it can follows from its code, which may drop the documents or need another attention.
    So a small copy is tested, in less than a second for most models.
    """
    if (name := attn_implementation(model.config)) not in ("sdpa", NAME):
        return f"uses attn_implementation={name}"
    if not can_set_attention(model):
        return "has an attention of its own"
    failure = "has no small copy to test it with"
    for small in small_copies(model.config, model):
        try:
            return _compare(small)
        except Exception as error:  # any error of the model's code, at these widths
            failure = f"does not pass documents to its layers ({describe_error(error)})"
    return failure


@torch.no_grad()
def _compare(small: PreTrainedModel) -> str:
    """Compare the logits of packed texts with those that a mask gives; see `find_obstacle`."""
    lengths = torch.tensor(PROBED_LENGTHS)
    positions = torch.cat([torch.arange(n) for n in PROBED_LENGTHS]).view(2, -1)
    with torch.random.fork_rng(devices=[]):
        size = text_config(small).vocab_size
        tokens = torch.randint(size // 8, size // 2, positions.shape)  # without special tokens
        inputs = {"input_ids": tokens, "position_ids": positions, "use_cache": False}
        masked = small(**inputs).logits
        small.set_attn_implementation(NAME)
        inputs |= packed_arguments(lengths, tokens.device)
        try:
            packed = small(**inputs).logits
            small.train()(**inputs)  # has dropout, if the model has any
        except NotImplementedError as error:
            return str(error)
    if (packed - masked).abs().max() <= TOLERANCE * masked.std():
        return ""
    return "does not pass documents to its layers"


def _register() -> None:
    """Register the attention in transformers. Calls without documents get the mask of `sdpa`."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
