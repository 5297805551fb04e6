"""A base that other adapters need is not replaced, and an adapter is pushed for its own base."""

import json
import logging

import pytest
from hub_server import READ_ONLY_TOKEN
from safetensors.numpy import save_file

from hqqtrain.common.errors import UserError
from hqqtrain.config.hub import HubConfig
from hqqtrain.formats.adapter_base import BaseModelRef
from hqqtrain.rundir.layout import RunLayout
from hqqtrain.rundir.schema import Summary
from hqqtrain.tasks.pushed_result import check_result, push_result, results_of_training
from hqqtrain.tasks.pushed_run import PushedRun

RUN = PushedRun({}, Summary())
HUB = HubConfig(push="alice/tuned", base="alice/base")


def _config_json(fingerprint: str) -> bytes:
    quantization = {"quant_method": "hqqtrain", "layout_version": 1, "modules": {},
                    "fingerprint": fingerprint}  # fmt: skip
    return json.dumps({"quantization_config": quantization}).encode()


@pytest.fixture
def results(tmp_path):
    """Return the base and the adapter of a run whose base has the fingerprint sha256:1."""
    layout = RunLayout(tmp_path)
    for folder in (layout.quantized, layout.adapter):
        folder.mkdir()
    (layout.quantized / "config.json").write_bytes(_config_json("sha256:1"))
    (layout.adapter / "adapter_config.json").write_text(
        json.dumps({"r": 8, "lora_alpha": 16, "base_model_name_or_path": str(layout.quantized)})
    )
    metadata = BaseModelRef("", None, "sha256:1").metadata()
    save_file({}, layout.adapter / "adapter_model.safetensors", metadata)
    return results_of_training(layout, HUB)


def test_a_named_base_is_used_if_it_is_the_same(hub, results, caplog, monkeypatch):
    hub.add("alice/base", {"config.json": _config_json("sha256:1")}, private=False)
    for result in results:
        check_result(result, HUB)
    with caplog.at_level(logging.INFO, "hqqtrain"):
        for result in results:
            push_result(result, RUN, HUB, [])
    assert "alice/base: has this base already" in caplog.text
    assert len(hub.repos["alice/base"].titles) == 1
    adapter = json.loads(hub.text("alice/tuned", "adapter_config.json"))
    assert adapter["base_model_name_or_path"] == "alice/base"
    monkeypatch.setenv("HF_TOKEN", READ_ONLY_TOKEN)  # the base of somebody else
    check_result(results[0], HUB)
    with pytest.raises(UserError, match=r"hub.push=alice/tuned: the token may not write there"):
        check_result(results[1], HUB)


def test_another_base_is_not_replaced(hub, results):
    hub.add("alice/base", {"config.json": _config_json("sha256:2")})
    with pytest.raises(UserError, match=r"^hub.base=alice/base: has another quantized base \(sha2"):
        push_result(results[0], RUN, HUB, [])
    with pytest.raises(UserError, match=r"with alice/base: trained on the base sha256:1, but this"):
        push_result(results[1], RUN, HUB, [])


def test_an_adapter_needs_its_base_on_the_hub(hub, results):
    with pytest.raises(UserError, match=r"Push the quantized base to alice/base first, or set hub"):
        push_result(results[1], RUN, HUB, [])
