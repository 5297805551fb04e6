"""The settings of quantized layers survive JSON, and damaged ones are refused."""

import json

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.formats.quantized_settings import QuantizedSettings, read_quantized_settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(layout_version=99), "layout_version=99; this hqqtrain reads 1"),
        (lambda q: q.update(quant_method="hqq"), "not a model quantized by hqqtrain"),
        (lambda q: q.pop("modules"), "damaged"),
        (lambda q: q.update(modules=[]), "damaged"),
        (lambda q: next(iter(q["modules"].values())).update(nbits=5), "damaged.*nbits=5"),
        (lambda q: next(iter(q["modules"].values())).update(meta_dtype="load"), "damaged"),
        (lambda q: next(iter(q["modules"].values())).update(group_size=7), "damaged"),
        (lambda q: next(iter(q["modules"].values())).update(extra=7), "damaged"),
    ],
)
def test_damaged_settings_are_refused(make_trained, tmp_path, change, message):
    folder = make_trained().save(tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_quantized_settings(folder)


def test_settings_survive_json(make_trained):
    settings = make_trained(axis=0, group_size=None, nbits=8).settings
    found = json.loads(json.dumps(settings.quantization_config()))
    assert {
        n: type(settings.modules[n])(**v) for n, v in found["modules"].items()
    } == settings.modules
    assert (
        QuantizedSettings.from_model(make_trained(axis=0, group_size=None, nbits=8).model).modules
        == settings.modules
    )
