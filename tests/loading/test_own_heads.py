"""Heads of every name and tie: quantized, saved, read again and exported, alone and on ranks."""

from pathlib import Path

import pytest
import torch
from random_models import load_like_a_run, random_family
from ranks import CPU, on_ranks
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.local import full_tensor
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.row_sharding import shard_rows
from hqqtrain.loading.load import load_model
from hqqtrain.loading.model_builder import LoadedModel, build_model
from hqqtrain.loading.plan import plan_model
from hqqtrain.models.build import build_meta, load_hf_config
from hqqtrain.models.source import ModelSource
from hqqtrain.models.weights.synthetic import open_weight_source
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.replace import output_head_name
from hqqtrain.tasks.export import export
from hqqtrain.tasks.model import plan_settings

OWN_HEAD = {"lm_head.weight": torch.linspace(-0.5, 0.5, 96 * 32).view(96, 32)}
OWN_BIAS = {"cls.predictions.decoder.bias": torch.linspace(-1, 1, 96)}
CASES = {
    "own head": ("llama", OWN_HEAD), "tied head": ("llama", {}), "bert": ("bert", {}),
    "own bias": ("bert", OWN_BIAS), "embed_out": ("gpt_neox", {}),
}  # fmt: skip


def save(case: str, folder: Path) -> None:
    """Save the random model of a case."""
    kind, own = CASES[case]
    options = {"is_decoder": True} if kind == "bert" else {}
    tied = kind != "gpt_neox"
    random_family(kind, tie_word_embeddings=tied, **options).save_pretrained(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | own, file, {"format": "pt"})


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(3, 23)[None], use_cache=False).logits


def build(run) -> LoadedModel:
    plan = plan_model(plan_settings(run.config), run.runtime)
    return build_model(plan, run.runtime.strategy, run.config.adapter, run.config.train.seed)


@pytest.mark.parametrize("skip", [["lm_head"], []], ids=["dense", "quantized"])
@pytest.mark.parametrize("case", CASES)
def test_a_head_survives_saving_and_export(case, skip, make_config, start_run, tmp_path):
    source = tmp_path / "source"
    save(case, source)
    keys = {"quant": {"nbits": 8, "skip": skip}}
    model = {"name_or_path": str(source)}
    with start_run(make_config("quantize", model=model, run={"name": "a"}, **keys)) as run:
        loaded = build(run)
        head = loaded.model.get_submodule(output_head_name(loaded.model))
        assert isinstance(head, HQQLinear) == (not skip)
        loaded.save_packed(tmp_path / "packed", run.runtime.comm, extra_json={})
    # 8 bits are near the dense model.
    assert torch.allclose(logits(loaded.model), logits(load_like_a_run(source)), atol=0.1)
    model = {"name_or_path": str(tmp_path / "packed")}
    with start_run(make_config("export", model=model, run={"name": "b"}, **keys)) as run:
        again = build(run)
        assert torch.equal(logits(again.model), logits(loaded.model))
        export(run)
        exported = AutoModelForCausalLM.from_pretrained(run.layout.export, dtype=torch.float32)
    assert torch.allclose(logits(exported), logits(loaded.model), atol=1e-4)


def gather(rank: int, comm: Communicator, folder: Path, strategy: str) -> None:
    """Load the model in `folder` on all ranks, and let rank 0 save its tensors."""
    model = build_meta(load_hf_config(folder), torch.float32)
    reader = open_weight_source(ModelSource("", folder, "dense"), model, CPU)
    if strategy == "fsdp2":
        FSDP2(comm).shard(model)
    elif strategy == "rows":
        shard_rows(model, comm)
    load_model(model, reader, comm)
    tensors = {name: full_tensor(t).clone() for name, t in model.state_dict().items()}
    if rank == 0:
        save_file(tensors, folder / "gathered.safetensors")


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp", "rows"])
@pytest.mark.parametrize("case", ["own head", "own bias"])
def test_ranks_load_the_same_head(case, strategy, tmp_path):
    save(case, tmp_path)
    assert on_ranks(gather, 2, tmp_path, strategy) == ["", ""]
    found = load_file(tmp_path / "gathered.safetensors")
    truth = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        assert torch.equal(found[name], tensor), name
