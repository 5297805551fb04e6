"""Synthetic weights: the same bits for any slice, with the statistics of a real model."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.model import ModelConfig
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.fqn import expected_shapes
from hqqtrain.models.source import TINY_FOLDER, resolve_source
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import SyntheticReader, open_weight_source

CPU = torch.device("cpu")
SHAPES = {
    "a.weight": (611, 1000), "b.weight": (611, 1000), "thin.weight": (300, 7),
    "norm.weight": (40,), "a.bias": (40,), "experts": (6, 5, 64),
}  # fmt: skip
GOLDEN = [15700, 15395, -17335, -17419, -17279, 15499, -17610]


def reader(dtype: torch.dtype = torch.float32, **options) -> SyntheticReader:
    return SyntheticReader(SHAPES, dtype, CPU, **options)


@pytest.mark.parametrize("name", SHAPES)
def test_any_rows_have_the_bits_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch):
    whole = reader().read(name)
    assert whole.shape == SHAPES[name]
    monkeypatch.setattr("hqqtrain.models.weights.synthetic._CHUNK_NUMEL", {"cpu": 3000})
    part = reader().read(name, [slice(5, 6), slice(0, 0), slice(2, 6)])
    assert torch.equal(part, torch.cat([whole[5:6], whole[2:6]]))
    assert reader().read(name, [slice(3, 3)]).shape == (0, *SHAPES[name][1:])


def test_numbers_are_nearly_normal_and_independent():
    a, b = reader(deviation=0.02).read("a.weight"), reader(deviation=0.02).read("b.weight")
    assert a.mean().item() == pytest.approx(0, abs=1e-4)
    assert a.std().item() == pytest.approx(0.02, rel=0.01)
    assert 4 < a.abs().max().item() / 0.02 < 5
    assert ((a / 0.02) ** 4).mean().item() == pytest.approx(3 - 1.2 / 8, rel=0.02)
    for other in (b, a.roll(1, 0), a.roll(1, 1), a.flip(0)):  # 1 sigma of 611,000 numbers is 0.0013
        pair = torch.stack([a.flatten(), other.flatten()])
        assert abs(torch.corrcoef(pair)[0, 1].item()) < 0.006
    assert len(a.unique(dim=0)) == 611
    assert not torch.equal(a, reader(deviation=0.02, seed=1).read("a.weight"))


def test_vectors_are_ones_for_norms_and_zeros_for_biases():
    assert torch.equal(reader().read("norm.weight"), torch.ones(40))
    assert torch.equal(reader().read("a.bias"), torch.zeros(40))


def test_golden_bits():
    """The golden bits are those of `reader(torch.bfloat16).read("thin.weight")[:1]` on a CPU."""
    found = reader(torch.bfloat16).read("thin.weight", [slice(0, 1)])[0]
    assert found.view(torch.int16).tolist() == GOLDEN


def test_generated_bytes_are_counted():
    made = reader(torch.bfloat16)
    made.read("a.weight", [slice(0, 10)])
    assert made.bytes_read == 2 * 10 * 1000
    assert made.total_bytes == 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert "a.weight" in made
    assert "other" not in made


@pytest.mark.gpu
def test_a_gpu_makes_the_same_bits():
    there = SyntheticReader(SHAPES, torch.bfloat16, torch.device("cuda")).read("a.weight")
    assert torch.equal(there.cpu(), reader(torch.bfloat16).read("a.weight"))


def test_a_well_known_architecture_needs_no_network_access():
    model = ModelConfig(name_or_path="meta-llama/Llama-3.1-405B", source="synthetic")
    source = resolve_source(model)
    assert (source.kind, source.tokenizer) == ("synthetic", TINY_FOLDER)
    meta = build_meta(load_hf_config(source.path))
    weights = open_weight_source(source, meta, CPU)
    assert weights.check(expected_shapes(meta, packed=False)) == []
    row = weights.read("model.layers.125.mlp.down_proj.weight", [slice(16383, 16384)])
    assert (row.shape, row.dtype) == ((1, 53248), torch.bfloat16)
    # An embedding of more than 2^31 elements.
    assert weights.read("model.embed_tokens.weight", [slice(128255, 128256)]).shape == (1, 16384)


def test_a_folder_provides_only_its_architecture():
    source = resolve_source(ModelConfig(name_or_path=str(TINY_FOLDER), source="synthetic"))
    meta = build_meta(load_hf_config(TINY_FOLDER))
    made = open_weight_source(source, meta, CPU)
    real = SafetensorsReader(TINY_FOLDER)
    assert isinstance(made, SyntheticReader)
    name = "model.layers.0.mlp.up_proj.weight"
    assert made.shape(name) == real.shape(name)
    assert not torch.equal(made.read(name), real.read(name))


def test_a_vocabulary_below_the_tokenizers_is_refused():
    config = load_hf_config(TINY_FOLDER)
    config.vocab_size = 100
    source = resolve_source(ModelConfig(source="synthetic"))
    with pytest.raises(UserError, match=r"model.source=synthetic: .* only 100"):
        open_weight_source(source, build_meta(config), CPU)


def test_a_revision_of_a_shipped_model_is_refused():
    model = ModelConfig(name_or_path="tiny", source="synthetic", revision="main")
    with pytest.raises(UserError, match=r"model\.revision=main"):
        resolve_source(model)
