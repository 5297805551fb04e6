"""The task `data`: show what a training with the same settings would be trained on.

It reads the configuration and the tokenizer of the model, and no weights.
"""

import shutil
import sys
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hqqtrain.common.secrets import mask_secrets
from hqqtrain.common.text import count
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.groups import DataConfig, EvalConfig
from hqqtrain.config.model import ModelConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.data.mixture import SourceUse
from hqqtrain.data.row_examples import RowCounts
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.sources import count_rows, source_format
from hqqtrain.data.statistics import (
    DataReport,
    count_parts,
    example_ends,
    measure_data,
    token_masks,
)
from hqqtrain.models.build import load_hf_config
from hqqtrain.models.source import resolve_source
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.report.data_console import render_data
from hqqtrain.report.data_page import write_data_page
from hqqtrain.report.data_view import DataSample, DataView, Piece
from hqqtrain.rundir.schema import DataMetrics
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import (
    check_same_text,
    load_held_out_data,
    load_training_data,
)
from hqqtrain.tasks.tokenizer import prepare_tokenizer
from hqqtrain.tracking.console import has_color

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONSOLE_TOKENS, PAGE_TOKENS = 512, 4096
"""Most tokens of a sample that the console and the page show; the middle of others is hidden."""

_CONTEXT = 4
"""Tokens before a piece that are decoded with it. They may decide whether it has a space."""


class DataModel(NamedTuple):
    """The tokenizer of a model, its folder, and the number of its token ids, if known."""

    tokenizer: "PreTrainedTokenizerBase"
    folder: Path
    vocab_size: int | None


def show_data(run: Run) -> None:
    """Print the figures and samples of the training data, and write them to report/data.html."""
    comm = run.runtime.comm
    with comm.raise_on_all_ranks():
        model = load_data_model(run.config.model, run.config.data)
        format = source_format(run.config.data)
    data = load_training_data(run, model.folder, model.vocab_size)
    held_out = load_held_out_data(run, model.folder, model.vocab_size)
    with comm.raise_on_all_ranks():
        streams = run.config.data.streaming  # then only the first rows are read
        rows = RowCounts() if streams else count_rows(run.config.data)
        parts, uses = data.parts, data.uses
    check_same_text(run, data.sequences, held_out)
    counts = {"bad rows": rows.bad, "rows without text": rows.blank}
    report = DataReport(
        measure_data(parts, data.sequences, run.config.train.max_seq_len),
        {reason: number for reason, number in counts.items() if number},
        rows.empty_answers,
        _held_out_figures(held_out, run.config.eval) if held_out else None,
        uses,
    )
    metrics = data_metrics(run.config, format, report)
    run.recorder.begin_without_model()
    run.recorder.summary.add_data(metrics)
    sampler = Sampler(parts, model.tokenizer, uses)
    comm.run_on_rank0(lambda: _show(run, sampler, metrics))


def load_data_model(model: ModelConfig, data: DataConfig) -> DataModel:
    """Load the tokenizer of `model` with the tokens of `data`, and read its config.json.

    Raises:
        UserError: The model is missing, or its configuration or its tokenizer cannot be read.
    """
    source = prepare_tokenizer(resolve_source(model, weights=False), data)
    text_config = load_hf_config(source.path).get_text_config(decoder=True)
    vocab_size = getattr(text_config, "vocab_size", None)
    if vocab_size is not None:
        vocab_size = max(vocab_size, *(id + 1 for id in source.trained_token_ids), 0)
    return DataModel(load_tokenizer(source.tokenizer), source.tokenizer, vocab_size)


def data_metrics(config: RunConfig, format: str, report: DataReport) -> DataMetrics:
    """Return the `data` part of summary.json."""
    return DataMetrics(
        source=mask_secrets(describe_source(config.data.source)),
        sources=mask_secrets([asdict(use) for use in report.uses]) or None,
        format=format,
        max_seq_len=config.train.max_seq_len,
        left_out=dict(report.left_out) or None,
        empty_answers=report.empty_answers or None,
        held_out=dict(report.held_out) if report.held_out else None,
        **asdict(report.statistics),
    )


def _held_out_figures(held_out: TokenSequences, evaluation: EvalConfig) -> dict[str, int]:
    """Return the figures of the held-out examples; the sequences are what is measured.

    The perplexity is that of the predicted tokens: in chats, those of the answers. Joined texts
    have windows in place of examples.
    """
    return {
        "windows" if evaluation.joins_texts else "examples": len(held_out.starts),
        "tokens": len(held_out.stream),
        "measured_tokens": int((held_out.end - held_out.begin).sum()),
        "predicted_tokens": held_out.target_token_count,
    }


def _show(run: Run, sampler: "Sampler", metrics: DataMetrics) -> None:
    parts = sampler.parts
    indices = sample_indices(len(parts.starts), run.config.data.show)

    def view(max_tokens: int) -> DataView:
        samples = [sampler.sample(index, max_tokens) for index in indices]
        return DataView(metrics, parts.is_plain_text, samples)

    text = render_data(
        view(CONSOLE_TOKENS),
        color=has_color(sys.stdout),
        can_show_unicode=(sys.stdout.encoding or "").lower().startswith("utf"),
        columns=shutil.get_terminal_size().columns if sys.stdout.isatty() else None,
    )
    run.recorder.console.print_text(text)
    write_data_page(run.layout.folder, view(PAGE_TOKENS), run.config.run_name())


def sample_indices(examples: int, number: int) -> list[int]:
    """Return the indices of `number` examples, evenly spaced from the first one on."""
    number = min(number, examples)
    return [index * examples // number for index in range(number)]


class Sampler:
    """Decodes examples.

    Args:
        parts: All tokens of the examples, and as sequences those to train on.
        tokenizer: The tokenizer that has made them.
        uses: How each source is used, in the order of the examples. The samples name no source if
            its numbers do not add up, because the chat template has refused some examples.
    """

    def __init__(
        self,
        parts: TokenSequences,
        tokenizer: "PreTrainedTokenizerBase",
        uses: Sequence[SourceUse] = (),
    ) -> None:
        self._stream, self._starts, self._ends = parts.stream, parts.starts, example_ends(parts)
        self._tokenizer, self._counts = tokenizer, count_parts(parts)
        self.parts = parts
        used = sum(use.used for use in uses)
        self._uses = uses if used == len(self._ends) and len(uses) > 1 else ()
        self._special_ids = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}

    def sample(self, index: int, max_tokens: int) -> DataSample:
        """Return at most `max_tokens` tokens of an example that are trained on.

        An example that is in no sequence is shown as a whole.
        """
        tokens = slice(int(self._starts[index]), int(self._ends[index]))
        kept, trained = token_masks(self.parts, tokens.start, tokens.stop)
        title = self._title(index, kept, int(np.count_nonzero(trained)))
        kept = kept if kept.any() else ~kept
        ids, trained = self._stream[tokens][kept], trained[kept]
        if len(ids) <= max_tokens:
            return DataSample(title, list(self._pieces(ids, trained)))
        begin, end = 3 * max_tokens // 4, len(ids) - max_tokens // 4
        return DataSample(
            title,
            list(self._pieces(ids[:begin], trained[:begin])),
            end - begin,
            list(self._pieces(ids[end:], trained[end:])),
        )

    def _title(self, index: int, kept: np.ndarray, trained: int) -> str:
        parts = [count(len(kept), "token"), f"{trained:,} trained"]
        if not kept.any():
            parts.append("in no sequence")
        elif not kept.all():
            parts.append(f"{np.count_nonzero(~kept):,} cut off")
        if self._counts[index] > 1:
            parts.append(f"split into {self._counts[index]:,} parts")
        source = f", from {self._source_of(index)}" if self._uses else ""
        return f"example {index + 1:,} of {len(self._ends):,}{source}: {', '.join(parts)}"

    def _source_of(self, index: int) -> str:
        """Return the source of an example; the examples are in the order of the sources."""
        ends = list(accumulate(use.used for use in self._uses))
        return mask_secrets(self._uses[bisect_right(ends, index)].source)

    def _pieces(self, ids: np.ndarray, trained: np.ndarray) -> Iterator[Piece]:
        """Yield the pieces of neighboring tokens; a special token is a piece of its own."""
        special = np.isin(ids, list(self._special_ids))
        changes = (np.diff(trained) != 0) | special[1:] | special[:-1]
        for begin, end in pairwise([0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]):
            if begin < end:
                text = self._decode(ids, begin, end)
                # A token that the tokenizer does not have, or one without a text of its own.
                nameless = "".join(f"<token {token}>" for token in ids[begin:end].tolist())
                is_special = bool(special[begin]) or not text
                yield Piece(text or nameless, bool(trained[begin]), is_special)

    def _decode(self, ids: np.ndarray, begin: int, end: int) -> str:
        """Return the text that the tokens from `begin` to `end` add to those before them."""
        before = self._text(ids[max(0, begin - _CONTEXT) : begin])
        text = self._text(ids[max(0, begin - _CONTEXT) : end])
        if text.startswith(before) and not before.endswith("\N{REPLACEMENT CHARACTER}"):
            return text[len(before) :]
        return self._text(ids[begin:end])  # the tokens on both sides may make one character

    def _text(self, ids: np.ndarray) -> str:
        text = self._tokenizer.decode(
            ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # a list of texts is for a list of lists
        return text
