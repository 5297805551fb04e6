"""The texts that are read before a training: all of them, or with `data.streaming` the first."""

from collections.abc import Iterable

from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.data.examples import Example
from hqqtrain.data.sources import load_held_out_texts, load_training_texts
from hqqtrain.data.streaming.sources import first_training_texts, streamed_held_out_texts


def training_texts(data: DataConfig, evaluation: EvalConfig) -> Iterable[Example]:
    """Return the examples to train on; see `load_training_texts` and `first_training_texts`.

    Raises:
        UserError: The source cannot be read, or overlaps with the held-out text.
    """
    load = first_training_texts if data.streaming else load_training_texts
    return load(data, evaluation)


def held_out_texts(evaluation: EvalConfig, data: DataConfig) -> Iterable[Example]:
    """Return the held-out examples; see `load_held_out_texts` and `streamed_held_out_texts`.

    Raises:
        UserError: The source cannot be read, or has no text to hold out.
    """
    load = streamed_held_out_texts if data.streaming else load_held_out_texts
    return load(evaluation, data)
