"""A model that hqq has quantized is trained, evaluated and saved at any number of ranks."""

import shutil
from pathlib import Path

import pytest
import torch
from foreign_models import load_foreign
from runs import SMALL, run
from small_model import small_model
from transformers import AutoModelForCausalLM

from hqqtrain.formats.packed import fingerprinted
from hqqtrain.formats.quantized_settings import read_quantized_settings

hqq_hf = pytest.importorskip("hqq.models.hf.base", reason="hqq is not installed here")
from hqq.core.quantize import BaseQuantizeConfig  # noqa: E402


@pytest.fixture(scope="module")
def quantized_by_hqq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hqq") / "model"
    model = AutoModelForCausalLM.from_pretrained(small_model())
    config = BaseQuantizeConfig(nbits=2, group_size=64, axis=0)
    hqq_hf.AutoHQQHFModel.quantize_model(model, config, model.dtype, device="cpu")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied, to be saved
    hqq_hf.AutoHQQHFModel.save_to_safetensors(model, str(folder))
    for file in small_model().glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def test_it_trains_on_two_ranks_and_is_the_same_model_as_on_one(quantized_by_hqq, tmp_path):
    words = (*SMALL, f"model.name_or_path={quantized_by_hqq}", "train.max_steps=2")
    trained = run(*words, root=tmp_path / "runs", processes=2)
    assert trained.code == 0, trained.output
    assert "14 linear layers are taken over as hqq has quantized them" in trained.output
    figures = trained.summary["quantize"]
    assert (figures["nbits"], figures["axis"], figures["solver"]) == (2, 0, "hqq")
    assert figures["fingerprint"] == fingerprinted(load_foreign(quantized_by_hqq)).fingerprint
    saved = read_quantized_settings(trained.directory / "quantized")
    assert saved.fingerprint == figures["fingerprint"]
