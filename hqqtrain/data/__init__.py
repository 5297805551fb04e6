"""Turn text into batches: sources, packing, a resumable sample order, and the held-out set."""

from hqqtrain.data.evalset import evaluation_set
from hqqtrain.data.order import SampleOrder
from hqqtrain.data.packing import IGNORED, Sequences, collate, pack
from hqqtrain.data.sources import dataset_name, held_out_texts, training_texts

__all__ = [
    "IGNORED", "SampleOrder", "Sequences", "collate", "dataset_name", "evaluation_set",
    "held_out_texts", "pack", "training_texts",
]  # fmt: skip
