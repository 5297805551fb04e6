"""`evaluate`: perplexity, and the distance to a reference model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hqqtrain.api.arguments import named_as_arguments
from hqqtrain.api.folders import transformers_model
from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.tokenization import check_token_ids
from hqqtrain.distributed.comm import Communicator
from hqqtrain.evaluation.perplexity import EvalResult, evaluate_perplexity
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.rope import max_batched_length


@public_function(model=nn.Module, tokenizer=PreTrainedTokenizerBase)
def evaluate(
    model: nn.Module,
    data: TokenSequences | str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    reference: nn.Module | None = None,
    max_seq_len: int = 2048,
    batch_size: int = 1,
) -> EvalResult:
    """Measure perplexity, and with a reference KL divergence, in this process.

    A text that is packed with others is measured by itself. `load_data(..., split="held_out")`
    gives the windows that a run measures, with the same result.

    Args:
        model: A causal language model, quantized or not, with or without adapters, on one device.
        data: The result of `load_data`, or texts.
        tokenizer: The tokenizer of the model, for texts.
        reference: The full-precision model, on the same device.
        max_seq_len: The largest number of tokens of a window of a text.
        batch_size: The number of windows in a batch.

    Returns:
        `perplexity`, `loss` in nats and `tokens`; with a reference `kl` in nats per token,
        `reference_perplexity` and `top1_agreement`.

    Raises:
        UserError: There is nothing to predict, or the model lacks a token.
    """
    with named_as_arguments("evaluate", data="data.source"):
        base = transformers_model(model)
        if batch_size < 1 or max_seq_len < 2:
            raise UserError("batch_size must be at least 1, and max_seq_len at least 2.")
        windows = single_texts(data, tokenizer, max_seq_len)
        check_tokens(windows, model, tokenizer)
        layout = BatchLayout(packs=False, max_batched_length=max_batched_length(base))
        return evaluate_perplexity(
            model, windows, single_process(base), batch_size=batch_size, reference=reference,
            layout=layout,
        )  # fmt: skip


def single_texts(
    data: TokenSequences | str | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None,
    max_seq_len: int,
) -> TokenSequences:
    """Return sequences that have one text each.

    Raises:
        UserError: There is no tokenizer, or nothing to predict.
    """
    if not isinstance(data, TokenSequences):
        if tokenizer is None:
            raise UserError("tokenizer=None: texts need the tokenizer of the model.")
        texts = [data] if isinstance(data, str) else data
        data = pack_examples(
            texts, tokenizer, max_seq_len=max_seq_len, packing=False, where="data",
            data=DataConfig(on_long="split"),
        ).sequences  # fmt: skip
    texts_alone = data.split_texts()
    if not len(texts_alone):
        raise UserError("data has no token to predict.")
    return texts_alone


def check_tokens(
    data: TokenSequences, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Check that the model has an embedding for every token.

    Raises:
        UserError: It has not.
    """
    size = vocabulary_size(model)
    if tokenizer is not None:
        check_token_ids(data.stream, tokenizer, size, "data")
    elif len(data.stream) and (largest := int(data.stream.max())) >= size:
        raise UserError(
            f"data has the token {largest}, but the model has only {size} embeddings; use the "
            "tokenizer of the model."
        )


def single_process(model: Any) -> Communicator:
    """Return the communicator of one process, on the device of a model.

    Raises:
        UserError: The model is on several devices.
    """
    devices = {param.device for param in model.parameters()}
    if len(devices) > 1 or torch.device("meta") in devices:
        shown = ", ".join(sorted(map(str, devices)))
        raise UserError(f"model is on {shown}; it must be in the memory of one device.")
    return Communicator(0, 1, devices.pop())
