"""Call a causal language model and align its outputs with the tokens that they predict.

Training and evaluation share this module, so that both measure the same loss. With a vocabulary of
128,256, the logits of 2,048 tokens take 1 GiB in fp32. Both therefore compute their losses in
chunks. The sizes of the chunks are here, because the memory estimate counts one chunk, too.
"""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hqqtrain.common.errors import UserError, describe_error
from hqqtrain.models.families.positions import first_position
from hqqtrain.models.families.structure import input_embeddings, output_head, text_config
from hqqtrain.models.fqn import base_model, original_module
from hqqtrain.models.packed_attention import packed_arguments, uses_packed_attention

MAX_TRAINING_LOGITS = 1 << 24
"""Largest number of logits of one chunk of the training loss, about 200 MB with their gradients."""

MAX_EVALUATION_TOKENS = 2048
"""Largest number of tokens whose logits the evaluation converts to fp32 at a time."""


MAX_KEPT_BYTES = 1 << 29
"""Most bytes of hidden states that the evaluation keeps, so as not to call the full-precision model
again; see `hqqtrain.evaluation.reference`."""


def kept_hidden_bytes(model: nn.Module, tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes of the head's inputs for `tokens` tokens, if they can stand for the logits.

    The head of the evaluated `model` computes the logits from them, so it must be an unquantized
    layer. Otherwise the result is 0.
    """
    head = output_head(model)
    return tokens * head.in_features * dtype.itemsize if type(head) is nn.Linear else 0


def next_token_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run `model` on a batch and pair the output at each position with the next token.

    Args:
        model: Causal language model, which may be wrapped or sharded.
        batch: Arguments of the model and `labels`, each [sequences, tokens].

    Returns:
        The model's outputs, [sequences * (tokens - 1), vocabulary], and the labels of the next
        tokens, int64 [sequences * (tokens - 1)].

    Raises:
        UserError: The code of the model in transformers has failed.
    """
    with translate_model_errors(model):
        outputs = model(**model_inputs(model, batch), use_cache=False).logits[:, :-1].flatten(0, 1)
    return outputs, batch["labels"][:, 1:].flatten()


def model_inputs(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `model` for a batch: int64 [sequences, tokens], and the documents.

    Only a model that uses `varlen_attention` gets documents, if the batch has `document_lengths`,
    int64 [documents] on the CPU.
    """
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    lengths = inputs.pop("document_lengths", None)
    if lengths is not None and uses_packed_attention(model):
        inputs |= packed_arguments(lengths, inputs["input_ids"].device)
    if "position_ids" in inputs and (first := first_position(model)):
        inputs["position_ids"] = inputs["position_ids"] + first
    return inputs


@contextmanager
def translate_model_errors(model: nn.Module) -> Iterator[None]:
    """Translate an error that a model's own code raises into UserError.

    Such an error shows that config.json and the installed transformers do not fit together, such as
    a number of experts per token that is null. Errors of PyTorch and of this package pass.
    """
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, NotImplementedError) as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename
        if "/transformers/models/" not in file.replace("\\", "/"):
            raise
        raise UserError(
            f"model.name_or_path: the code of {type(base_model(model)).__name__} in the installed "
            f"transformers fails with this model's config.json ({describe_error(error)}). Correct "
            "config.json, or use the version of transformers that the model was made for."
        ) from error


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that `model` can read and predict.

    This is the number of rows of the embeddings, or of the head if it has fewer.
    """
    embeddings, head = (original_module(f(model)) for f in (input_embeddings, output_head))
    rows = [text_config(model).vocab_size]
    if isinstance(embeddings, nn.Embedding):
        rows = [embeddings.num_embeddings]
    if hasattr(head, "out_features"):
        rows.append(head.out_features)
    return min(rows)
