"""`load_data`: text and chats as sequences of tokens, for a loop of one's own."""

import os
from typing import Any

from transformers import PreTrainedTokenizerBase

from hqqtrain.api.arguments import checked_group, named_as_arguments
from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import DataConfig, EvalConfig, TrainConfig
from hqqtrain.config.public_function import public_function
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.layout import collate_batch
from hqqtrain.data.packing import pack_examples
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.texts import training_texts

__all__ = ["collate_batch", "load_data"]

SPLITS = (None, "train", "held_out")
"""Values of `split`."""


@public_function(tokenizer=PreTrainedTokenizerBase)
def load_data(
    source: str | os.PathLike[str] | list[Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_len: int = 2048,
    packing: bool = True,
    split: str | None = None,
    tokens: int = 65536,
    format: str = "auto",
    file_type: str = "auto",
    text_field: str = "text",
    chat_template: str = "auto",
    loss_on: str = "auto",
    on_long: str = "auto",
    max_bad_rows: int = 0,
    validation: float = 0.02,
) -> TokenSequences:
    """Read and tokenize a source, and arrange its examples in sequences.

    Args:
        source: A value of `data.source`: a file, folder, pattern or hub name, `python_stdlib`, or a
            list of these.
        tokenizer: The tokenizer of the model.
        max_seq_len: The largest number of tokens in a sequence.
        packing: Whether several examples share a sequence. The model must be called without an
            attention mask and with `use_cache=False`, so that `position_ids` keep them apart.
        split: `train`: without the examples that are held out; `held_out`: these alone, in windows
            as a run measures them; None: all examples, or the training split of a source that has
            splits.
        tokens: With `held_out`, the largest number of tokens.
        format: `auto`, `text`, `chat`, `alpaca`, `completion` or `tokens`.
        file_type: The type of local files; `auto`: by their extensions.
        text_field: The column with the text in format `text`.
        chat_template: `auto`: the tokenizer's own; or `chatml`, `gemma`, `llama3`, `mistral`,
            `plain`, or the path of a .jinja file.
        loss_on: Which tokens have a label: `auto`, `assistant`, `last`, `completion` or `all`.
        on_long: What happens to an example of more than `max_seq_len` tokens: `auto`, `truncate`,
            `split`, `drop` or `error`.
        max_bad_rows: The largest number of rows that may be left out because they cannot be read.
        validation: The share of the examples that is held out, if the source has no splits.

    Returns:
        The sequences. Each item is a dict of `input_ids`, `labels` and `position_ids`, int64
        [length]; `collate_batch` makes a batch of several. A label has the position of its own
        token, as transformers expects, and is -100 where nothing is predicted.

    Raises:
        UserError: The source cannot be read, has no text, or an argument is not allowed.
    """
    with named_as_arguments("load_data", tokens="eval.tokens", split="eval.source"):
        if split not in SPLITS:
            raise UserError(f"split={split}: allowed are {', '.join(map(str, SPLITS))}.")
        values = {"source": source, "format": format, "file_type": file_type,
                  "text_field": text_field, "chat_template": chat_template, "loss_on": loss_on,
                  "on_long": on_long, "max_bad_rows": max_bad_rows,
                  "validation": validation}  # fmt: skip
        data = checked_group(DataConfig, "data", values)
        length = checked_group(TrainConfig, "train", {"max_seq_len": max_seq_len}).max_seq_len
        evaluation = checked_group(EvalConfig, "eval", {"source": split and "auto",
                                                        "tokens": tokens})  # fmt: skip
        if split == "held_out":
            windows = load_eval_set(evaluation, data, tokenizer, length)
            assert windows is not None
            return windows
        where = f"data.source={describe_source(data.source)}"
        return pack_examples(
            training_texts(data, evaluation), tokenizer, max_seq_len=length, packing=packing,
            data=data, where=where,
        ).sequences  # fmt: skip
