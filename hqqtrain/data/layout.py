"""Arrange sequences of tokens in the rows of batches, as a model can read them.

Most models keep texts that share a row apart. Others let a text see the texts before it; they get
every text in a row of its own. Both ways compute the same loss of the same tokens. Only the padding
differs: texts of similar length share a batch, to keep it small.

A batch has no attention mask. It needs none: the padding follows the text, which never sees it.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hqqtrain.data.sequences import IGNORE_INDEX, TokenSequences

Batch = dict[str, Tensor]
"""The inputs of a model by name, and `labels`, each [sequences, tokens]; see `collate_batch`.

If its rows have several texts, it also has the lengths of these; see `batch_on_device`.
"""


@dataclass(frozen=True)
class BatchLayout:
    """Which texts may share a row, and a batch.

    Attributes:
        packs: Whether texts share a row, in which `position_ids` keep them apart. Otherwise each
            text has a row of its own, and the model counts the positions itself.
        max_batched_length: Longest text in tokens that may share a batch with other texts; None:
            any text may. It is for models that compute a text differently beside a longer one.
    """

    packs: bool = True
    max_batched_length: int | None = None

    def training_batches(
        self, sequences: TokenSequences, micro_batch_size: int, max_seq_len: int
    ) -> list[TokenSequences]:
        """Group sequences into micro-batches.

        A micro-batch has at most `micro_batch_size` sequences; if they are split into texts, it has
        at most as many tokens as that many sequences, padding included.

        Args:
            sequences: The sequences of one rank.
            micro_batch_size: `train.micro_batch_size`.
            max_seq_len: `train.max_seq_len`.
        """
        if self.packs:
            return [
                sequences.select(np.arange(start, min(start + micro_batch_size, len(sequences))))
                for start in range(0, len(sequences), micro_batch_size)
            ]
        texts = sequences.split_texts() or sequences  # single tokens predict nothing in any row
        lengths = texts.end - texts.begin
        return [
            texts.select(indices)
            for indices in self._group(lengths, micro_batch_size * max_seq_len)
        ]

    def evaluation_batches(self, windows: TokenSequences, batch_size: int) -> list[TokenSequences]:
        """Group windows, each of a single text, into batches of at most `batch_size`, in order."""
        lengths = windows.end - windows.begin
        limit = lengths.max() if self.max_batched_length is None else self.max_batched_length
        batchable = np.flatnonzero(lengths <= limit)
        groups = [
            batchable[start : start + batch_size] for start in range(0, len(batchable), batch_size)
        ]
        groups += list(np.flatnonzero(lengths > limit)[:, None])
        return [windows.select(group) for group in groups]

    def _group(self, lengths: np.ndarray, max_tokens: int) -> Iterator[np.ndarray]:
        """Yield the indices of the texts of each batch, from the longest texts to the shortest.

        Args:
            lengths: The length of each text in tokens.
            max_tokens: Largest number of tokens in a batch of several texts, padding included.
        """
        order = np.argsort(-lengths, kind="stable")
        start = 0
        while start < len(order):
            longest = lengths[order[start]]
            is_alone = self.max_batched_length is not None and longest > self.max_batched_length
            count = 1 if is_alone else max(1, max_tokens // longest)
            yield order[start : start + count]
            start += count


PACKED = BatchLayout()
"""The layout of most models."""


def batch_on_device(
    sequences: TokenSequences, layout: BatchLayout, device: torch.device | str
) -> Batch:
    """Combine sequences into a batch for `next_token_outputs`, on the device of the model.

    Returns:
        The result of `collate_batch`. If the layout packs, it also has `document_lengths`, int64
        [texts], on the CPU: the lengths of the texts, row by row. Padding, which no text sees, is
        a part of the last text of its row.
    """
    batch = collate_batch(sequences, has_positions=layout.packs)
    lengths = _document_lengths(batch["position_ids"], sequences) if layout.packs else None
    if torch.device(device).type == "cuda":  # from pinned memory, a copy runs beside the kernels
        batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
    batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return batch if lengths is None else batch | {"document_lengths": lengths}


def _document_lengths(position_ids: Tensor, sequences: TokenSequences) -> Tensor:
    """Return the lengths of the texts; see `batch_on_device`."""
    is_start = position_ids.numpy() == 0
    lengths = sequences.end - sequences.begin
    is_start &= np.arange(is_start.shape[1]) < lengths[:, None]  # a padding token is no text
    starts = np.append(np.flatnonzero(is_start), is_start.size)
    return torch.from_numpy(np.diff(starts))


def collate_batch(
    sequences: Iterable[Mapping[str, Tensor]], *, has_positions: bool = True
) -> Batch:
    """Combine sequences into a batch, int64 [sequences, longest], padded on the right.

    With an attention mask, transformers would not derive the texts of a sequence from
    `position_ids`.

    Args:
        sequences: Sequences as `TokenSequences` returns them.
        has_positions: Whether the batch has `position_ids`.
    """
    rows = list(sequences)
    padding = {"input_ids": 0, "labels": IGNORE_INDEX}
    if has_positions:
        padding["position_ids"] = 0  # makes every padding token a text of its own
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [row[name] for row in rows], batch_first=True, padding_value=value
        )
        for name, value in padding.items()
    }
