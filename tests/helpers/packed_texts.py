"""Random texts of many lengths, packed into sequences, and their loader."""

import numpy as np

from hqqtrain.config.groups import TrainConfig
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.loader import PackedLoader
from hqqtrain.data.sequences import TokenSequences, plain_text_targets

LENGTHS = (5, 40, 13, 2, 9, 30, 1, 17, 3, 24, 7, 11)
MAX_SEQ_LEN = 32
ROWS = BatchLayout(packs=False)


def packed_sequences(lengths=LENGTHS, max_seq_len=MAX_SEQ_LEN) -> TokenSequences:
    """Texts of random tokens in one stream, which is cut into sequences."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    stream = np.random.default_rng(0).integers(2, 500, ends[-1]).astype(np.int32)
    begin = np.arange(0, len(stream), max_seq_len)
    end = np.minimum(begin + max_seq_len, len(stream))
    return TokenSequences(stream, plain_text_targets(stream, starts), starts, begin, end)


def make_loader(layout: BatchLayout, rank: int = 0, world_size: int = 1, **train) -> PackedLoader:
    settings = {"global_batch_size": 6, "micro_batch_size": 2, "max_seq_len": MAX_SEQ_LEN}
    config = TrainConfig(**settings | train)
    return PackedLoader(packed_sequences(), config, rank=rank, world_size=world_size, layout=layout)
