"""A streamed model gives the figures of the whole one, for the batches of the held-out set."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from packed_texts import ROWS, packed_sequences
from random_models import load_like_a_run, random_family
from ranks import on_ranks
from torch import nn

from hqqtrain.common.errors import PreemptedError
from hqqtrain.data.layout import PACKED, BatchLayout
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.evaluation.perplexity import (
    EvalResult,
    batches_of_this_rank,
    evaluate_perplexity,
)
from hqqtrain.evaluation.streamed_reference import (
    StreamedReference,
    inputs_by_digest,
    stream_hidden_states,
)
from hqqtrain.loading.streamed_layers import StreamedLayers
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source

KINDS = ("llama", "gemma2", "opt")
"""The second one caps its logits, and the last one counts its positions from 2."""


def _save(kind: str, folder: Path) -> None:
    random_family(kind, vocab_size=512).save_pretrained(folder)


def _stream(
    folder: Path,
    comm: Communicator = SINGLE_PROCESS,
    layout: BatchLayout = PACKED,
    on_layer: Callable[[], object] = lambda: None,
    *,
    counts_first: bool = False,
) -> StreamedReference:
    model = build_meta(load_hf_config(folder), torch.float32)
    reader = open_weight_source(ModelSource("model", folder, "dense"), model, comm.device)
    streamed = StreamedLayers(model, reader, comm, {})
    streamed.load_outside()
    batches = batches_of_this_rank(packed_sequences(), 2, comm, layout, counts_first=counts_first)
    inputs = inputs_by_digest(streamed.model, (batch for batch, *_ in batches))
    return StreamedReference(streamed, stream_hidden_states(streamed, inputs, comm, on_layer))


def _evaluate(
    reference: nn.Module, comm: Communicator, layout: BatchLayout, **settings: bool
) -> EvalResult:
    model = random_family("llama", vocab_size=512)
    nn.init.normal_(model.lm_head.weight)
    return evaluate_perplexity(
        model, packed_sequences(), comm, batch_size=2, reference=reference, layout=layout,
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize("layout", [PACKED, ROWS], ids=["packed", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_figures_are_those_of_the_whole_model(kind: str, layout, tmp_path: Path) -> None:
    _save(kind, tmp_path)
    expected = _evaluate(load_like_a_run(tmp_path), SINGLE_PROCESS, layout)
    found = _evaluate(_stream(tmp_path, layout=layout), SINGLE_PROCESS, layout)
    assert found == expected
    assert found.kl > 0.1


def test_sequences_of_other_weights_have_other_batches(tmp_path: Path) -> None:
    _save("llama", tmp_path)
    expected = _evaluate(load_like_a_run(tmp_path), SINGLE_PROCESS, PACKED, counts_first=True)
    reference = _stream(tmp_path, counts_first=True)
    assert _evaluate(reference, SINGLE_PROCESS, PACKED, counts_first=True) == expected


def test_a_request_to_stop_ends_it_after_a_layer(tmp_path: Path) -> None:
    def on_layer() -> None:
        raise PreemptedError("SIGTERM was received")

    _save("llama", tmp_path)
    with pytest.raises(PreemptedError):
        _stream(tmp_path, on_layer=on_layer)


def test_another_batch_cannot_be_asked_for(tmp_path: Path) -> None:
    _save("llama", tmp_path)
    with pytest.raises(KeyError):
        _stream(tmp_path)(input_ids=torch.arange(4)[None])


def _stream_on_a_rank(rank: int, comm: Communicator, folder: str, expected: EvalResult) -> None:
    found = _evaluate(_stream(Path(folder), comm), comm, PACKED)
    for name in ("perplexity", "kl", "reference_perplexity", "top1_agreement"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-6)


@pytest.mark.ranks
def test_ranks_share_the_batches(tmp_path: Path) -> None:
    _save("llama", tmp_path)
    expected = _evaluate(load_like_a_run(tmp_path), SINGLE_PROCESS, PACKED)
    assert on_ranks(_stream_on_a_rank, 2, str(tmp_path), expected) == ["", ""]
