"""A streamed model computes what the whole one does, and has one decoder layer in memory."""

from pathlib import Path

import pytest
import torch
from random_models import random_family
from ranks import on_ranks
from safetensors.torch import load_file, save_file

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.loading.streamed_layers import StreamedLayers
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import open_weight_source

INPUTS = {"input_ids": torch.arange(3, 25).view(2, 11)}


def _open(
    folder: Path, comm: Communicator = SINGLE_PROCESS, **shared: torch.Tensor
) -> tuple[StreamedLayers, SafetensorsReader]:
    model = build_meta(load_hf_config(folder), torch.float32)
    reader = open_weight_source(ModelSource("model", folder, "dense"), model, comm.device)
    assert isinstance(reader, SafetensorsReader)
    return StreamedLayers(model, reader, comm, shared), reader


def _logits(streamed: StreamedLayers) -> torch.Tensor:
    """Return the logits, and check that no layer but the yielded one is in memory."""
    streamed.load_outside()
    layerwise = streamed.layerwise
    hidden, calls = layerwise.start(INPUTS)
    for index in streamed.load_layers():
        hidden = layerwise.run_layer(layerwise.layers[index], hidden, calls[index])
        for other, layer in enumerate(layerwise.layers):
            assert all(p.is_meta == (other != index) for p in layer.parameters())
    return layerwise.finish(INPUTS, hidden)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("gemma2", {}), ("gpt_neox", {})],
)
def test_it_computes_what_the_model_does(kind: str, options: dict, tmp_path: Path) -> None:
    model = random_family(kind, **options)
    model.save_pretrained(tmp_path)
    streamed, reader = _open(tmp_path)
    assert torch.equal(_logits(streamed), model(**INPUTS).logits)
    assert reader.bytes_read == reader.total_bytes


def test_the_tensors_of_another_model_are_not_read_again(tmp_path: Path) -> None:
    model = random_family("llama")
    model.save_pretrained(tmp_path)
    embeddings = model.model.embed_tokens.weight.data
    streamed, reader = _open(tmp_path, **{"model.embed_tokens.weight": embeddings})
    assert torch.equal(_logits(streamed), model(**INPUTS).logits)
    loaded = streamed.model.get_parameter("model.embed_tokens.weight")
    assert loaded.data_ptr() == embeddings.data_ptr()
    assert reader.bytes_read == reader.total_bytes - embeddings.nbytes


def _stream_on_a_rank(rank: int, comm: Communicator, folder: str, expected: torch.Tensor) -> None:
    streamed, reader = _open(Path(folder), comm)
    assert torch.equal(_logits(streamed), expected)
    assert 0 < reader.bytes_read < reader.total_bytes
    assert comm.all_reduce_sum([reader.bytes_read]) == [reader.total_bytes]


@pytest.mark.ranks
def test_each_weight_is_read_by_one_rank(tmp_path: Path) -> None:
    model = random_family("llama")
    model.save_pretrained(tmp_path)
    expected = model(**INPUTS).logits.detach()
    assert on_ranks(_stream_on_a_rank, 2, str(tmp_path), expected) == ["", ""]


def _refuse_on_a_rank(rank: int, comm: Communicator, folder: str) -> None:
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        _logits(_open(Path(folder), comm)[0])


@pytest.mark.ranks
def test_a_weight_that_is_nan_is_an_error_on_every_rank(tmp_path: Path) -> None:
    random_family("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    assert on_ranks(_refuse_on_a_rank, 2, str(tmp_path)) == ["", ""]
