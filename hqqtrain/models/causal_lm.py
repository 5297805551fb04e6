"""Call a causal language model and align its outputs with the tokens that they predict.

Training and evaluation share this module, so that both measure the same loss. With a vocabulary of
128,256, the logits of 2,048 tokens take 1 GiB in fp32. Both therefore compute their losses in
chunks. The sizes of the chunks are here, because the memory estimate counts one chunk, too.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from hqqtrain.models.families.positions import first_position
from hqqtrain.models.families.structure import input_embeddings, output_head, text_config

MAX_TRAINING_LOGITS = 1 << 24
"""Largest number of logits of one chunk of the training loss, about 200 MB with their gradients."""

MAX_EVALUATION_TOKENS = 2048
"""Largest number of tokens whose logits the evaluation converts to fp32 at a time."""


def next_token_outputs(model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Run `model` on a batch and pair the output at each position with the next token.

    Args:
        model: Causal language model, which may be wrapped or sharded.
        batch: Arguments of the model and `labels`, each [sequences, tokens].

    Returns:
        The model's outputs, [sequences * (tokens - 1), vocabulary], and the labels of the next
        tokens, int64 [sequences * (tokens - 1)].
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if "position_ids" in inputs and (first := first_position(model)):
        inputs["position_ids"] = inputs["position_ids"] + first
    outputs = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
    return outputs, batch["labels"][:, 1:].flatten()


def vocabulary_size(model: nn.Module) -> int:
    """Return the number of token ids that `model` can read and predict.

    This is the number of rows of the embeddings, or of the head if it has fewer.
    """
    embeddings, head = input_embeddings(model), output_head(model)
    rows = [text_config(model).vocab_size]
    if isinstance(embeddings, nn.Embedding):
        rows = [embeddings.num_embeddings]
    if hasattr(head, "out_features"):
        rows.append(head.out_features)
    return min(rows)
