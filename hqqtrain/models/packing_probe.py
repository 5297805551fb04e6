"""Find out whether texts that share a sequence see each other, by a test of a small copy.

transformers derives the mask of packed texts from `position_ids` in most models. In others the mask
or a recurrent state ignores them: a text then sees the texts before it, without any message. The
answer depends on the model's code, so it is measured and not looked up.
"""

import logging
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.models.build import build_meta
from hqqtrain.models.small_copy import VOCABULARY, small_copies
from hqqtrain.models.weight_access import find_read_linears

logger = logging.getLogger(__name__)

FIRST_LENGTH, SECOND_LENGTH = 11, 13
"""Tokens of the two texts of a test; both are longer than a small copy's windows."""

TOLERANCE = 1e-2
"""Largest difference between equal logits, as a share of their standard deviation.

Rounding errors in fp32 reach 1e-3 in the deepest models. A text that sees another one changes its
logits by 0.3 or more.
"""


@dataclass(frozen=True)
class PackingProbe:
    """The result of a test.

    Attributes:
        is_isolated: Whether `position_ids` that restart at 0 keep packed texts apart.
        reason: Why not, as the rest of a sentence that begins with the model; empty if they do.
        read_linears: Linears whose weight the code of the model reads; see `find_read_linears`.
    """

    is_isolated: bool
    reason: str = ""
    read_linears: frozenset[str] = frozenset()


@torch.no_grad()
def probe_packing(
    hf_config: PretrainedConfig, model: nn.Module, *, trains: bool = True
) -> PackingProbe:
    """Test whether a model keeps packed texts apart. It takes less than a second for most models.

    Args:
        hf_config: The configuration of the model.
        model: The model, which may be on the meta device.
        trains: Whether the model will be trained.

    Raises:
        UserError: The model is not causal, its logits are not finite, or transformers cannot call
            it with tokens alone.
    """
    failure: Exception | None = None
    for small in small_copies(hf_config, model):
        texts = _Texts(small)
        try:
            first, second = texts.logits(texts.first), texts.logits(texts.second)
        except Exception as error:  # any error of the model's code, at these widths
            failure = failure or error
            continue
        if not (first.isfinite().all() and second.isfinite().all()):
            raise UserError(
                f"model_type={hf_config.model_type}: {type(small).__name__} computes NaN or "
                "infinite logits with this config.json, whatever its weights are. Use the "
                "config.json that was saved with the weights."
            )
        if not _are_equal(texts.logits(texts.first, texts.second)[:FIRST_LENGTH], first):
            raise UserError(
                f"model_type={hf_config.model_type}: {type(small).__name__} is not causal with "
                "this config.json: a token sees later ones. Give a causal language model, or set "
                "is_decoder=true in config.json if the model was trained as one."
            )
        result = _probe_isolation(texts, torch.cat([first, second]))
        call = partial(texts.logits, texts.first)
        return replace(result, read_linears=find_read_linears(small, call, trains=trains))
    if failure is None:
        return PackingProbe(False, "could not be tested, because it has no small copy")
    _check_callable(hf_config, failure)
    return PackingProbe(False, f"could not be tested ({describe_error(failure)})")


class _Texts:
    """Two random texts, and calls of a small copy with them."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        generator = torch.Generator().manual_seed(0)

        def text(length: int) -> Tensor:
            # Special tokens have the lowest ids in most models, and the highest in small copies.
            return torch.randint(16, VOCABULARY // 2, (length,), generator=generator)

        self.first, self.second = text(FIRST_LENGTH), text(SECOND_LENGTH)
        self.other = text(FIRST_LENGTH)

    def logits(self, *texts: Tensor, packed: bool = False) -> Tensor:
        """Return the logits [tokens, vocabulary] of one sequence of `texts`.

        Args:
            texts: The texts.
            packed: Whether to pass `position_ids` that restart with every text.
        """
        inputs = {"input_ids": torch.cat(texts)[None]}
        if packed:
            inputs["position_ids"] = torch.cat([torch.arange(len(text)) for text in texts])[None]
        with torch.random.fork_rng(devices=[]):
            return self._model(**inputs, use_cache=False).logits[0].float()


def _probe_isolation(texts: _Texts, alone: Tensor) -> PackingProbe:
    """Compare the logits of packed texts with those of each text by itself, which are `alone`."""
    try:
        packed = texts.logits(texts.first, texts.second, packed=True)
        other = texts.logits(texts.other, texts.second, packed=True)
    except Exception as error:  # many models do not accept position_ids, each with its own error
        return PackingProbe(False, f"takes no position_ids ({describe_error(error)})")
    if not _are_equal(packed[FIRST_LENGTH:], other[FIRST_LENGTH:]):
        return PackingProbe(False, "lets a text see the texts before it in its sequence")
    if not _are_equal(packed, alone):
        return PackingProbe(False, "computes other logits for packed texts than for each by itself")
    return PackingProbe(True)


def _are_equal(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits are equal up to rounding errors; NaN equals nothing."""
    difference = (logits - expected).abs().max()
    return bool(difference <= TOLERANCE * expected.std())


def _check_callable(hf_config: PretrainedConfig, failure: Exception) -> None:
    """Check that `failure` of a small copy is not a failure of the model itself.

    Raises:
        UserError: The whole model fails with the same error, on the meta device.
    """
    model = build_meta(hf_config).eval()
    tokens = torch.zeros((1, FIRST_LENGTH), dtype=torch.long, device="meta")
    try:
        model(input_ids=tokens, use_cache=False)
    except Exception as error:
        if describe_error(error) == describe_error(failure):
            raise UserError(
                f"model_type={hf_config.model_type}: transformers cannot compute the logits of "
                f"{type(model).__name__} from tokens alone ({describe_error(error)}). Give a "
                "causal language model, or correct its config.json."
            ) from error
