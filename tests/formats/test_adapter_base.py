"""A model is compared with the base that the file of an adapter records."""

from pathlib import Path

import pytest
from torch import nn

from hqqtrain.common.errors import UserError
from hqqtrain.formats.adapter_base import base_fingerprint, check_base_of, saved_base_of
from hqqtrain.models.fqn import base_model


def test_a_model_without_a_recorded_fingerprint_is_hashed(make_trained, tmp_path: Path):
    trained = make_trained()
    model, file = base_model(trained.model), trained.save_adapter(tmp_path / "adapter")
    assert not hasattr(model.config, "quantization_config")
    assert base_fingerprint(model) == trained.settings.fingerprint
    check_base_of(trained.model, file / "adapter_model.safetensors", "adapter")
    model.config.quantization_config = {"fingerprint": "sha256:00"}
    with pytest.raises(UserError, match=r"adapter: .* but this base is sha256:00\. Load the quant"):
        check_base_of(trained.model, file / "adapter_model.safetensors", "adapter")


def test_files_without_metadata_are_left_to_peft(make_trained, tmp_path: Path):
    model = make_trained().model
    (tmp_path / "damaged").write_bytes(b"damaged")
    check_base_of(model, tmp_path / "damaged", "adapter")
    check_base_of(model, tmp_path / "absent", "adapter")
    check_base_of(nn.Linear(2, 2), tmp_path / "absent", "adapter")


def test_the_base_beside_an_adapter_is_found_by_its_fingerprint(make_trained, tmp_path: Path):
    trained, run = make_trained(), tmp_path / "run"
    adapter = trained.save_adapter(run / "adapter")
    checkpoint = trained.save_adapter(run / "checkpoints" / "step-00000001")
    assert saved_base_of(adapter) is None
    base = trained.save(run / "quantized")
    assert saved_base_of(adapter) == saved_base_of(checkpoint) == base
    text = (base / "config.json").read_text()
    for damaged in ("{", text.replace(trained.settings.fingerprint, "sha256:00")):
        (base / "config.json").write_text(damaged)
        assert saved_base_of(adapter) is None
    assert saved_base_of(base) is None
