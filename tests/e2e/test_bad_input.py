"""Bad input: one message that names the cause, exit code 2, and no file is written."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import SMALL, run
from safetensors.torch import load_file, save_file

from hqqtrain import models

TINY = Path(models.__file__).parent / "tiny"


def _copy(folder: Path) -> Path:
    return Path(shutil.copytree(TINY, folder / "model"))


def _truncated(folder: Path) -> list[str]:
    file = _copy(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return [f"model.name_or_path={file.parent}"]


def _with(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        file = _copy(folder) / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        return [f"model.name_or_path={file.parent}"]

    return make


def _poison(
    value: float, name: str = "model.layers.3.mlp.up_proj.weight"
) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(len(tensors[name]), -1)[5, -1] = value

    return change


def _without_linear(folder: Path) -> list[str]:
    """Write a GPT-2: its only nn.Linear is the head, which is not quantized by default."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=4096, n_embd=32, n_layer=1, n_head=2))
    model.save_pretrained(folder / "model")
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder / "model")
    return [f"model.name_or_path={folder / 'model'}"]


def _unreadable_data(folder: Path) -> list[str]:
    (folder / "data.jsonl").write_text('{"text": "fine"}\n{"text": "cut off')
    return [f"data.source={folder / 'data.jsonl'}"]


def _empty_data(folder: Path) -> list[str]:
    (folder / "data.txt").write_text("")
    return [f"data.source={folder / 'data.txt'}"]


CASES: dict[str, tuple[list[str] | Callable[[Path], list[str]], list[str]]] = {
    "unknown key": (["quant.nbit=3"], ["quant.nbit", "quant.nbits"]),
    "unknown recipe": (["recipe=tiny_2bits"], ["tiny_2bits", "tiny_2bit"]),
    "nbits": (["quant.nbits=5"], ["quant.nbits=5", "8, 4, 3, 2, 1"]),
    "group_size": (["quant.group_size=48"], ["quant.group_size=48", "128", "proj"]),
    "skip matches nothing": (["quant.skip=[lm_haed]"], ["quant.skip", "lm_haed"]),
    "override matches nothing": (
        ["quant.overrides={*.qq_proj: {nbits: 4}}"],
        ["*.qq_proj", "matches no"],
    ),
    "target matches nothing": (["adapter.target_modules=['*.w1']"], ["target_modules", "*.w1"]),
    "missing model": (["model.name_or_path=./no/such/folder"], ["./no/such/folder"]),
    "truncated": (_truncated, ["model.safetensors"]),
    "missing tensor": (
        _with(lambda t: t.pop("model.layers.2.self_attn.k_proj.weight")),
        ["model.layers.2.self_attn.k_proj.weight"],
    ),
    "wrong shape": (
        _with(lambda t: t.update({"model.norm.weight": torch.ones(3)})),
        ["model.norm.weight", "[3]", "[256]"],
    ),
    "NaN": (_with(_poison(float("nan"))), ["model.layers.3.mlp.up_proj.weight", "5"]),
    "Inf": (_with(_poison(float("inf"))), ["model.layers.3.mlp.up_proj.weight", "5"]),
    "NaN in a norm": (
        _with(_poison(float("nan"), "model.norm.weight")),
        ["model.norm.weight: row 5"],
    ),
    "Inf in the embedding": (
        _with(_poison(float("inf"), "model.embed_tokens.weight")),
        ["model.embed_tokens.weight: row 5"],
    ),
    "no linear": (_without_linear, ["GPT2LMHeadModel", "nn.Linear"]),
    "override of a skipped layer": (["quant.overrides={lm_head: {nbits: 8}}"], ["lm_head"]),
    "paged optimizer on a CPU": (["optim.name=paged_adamw"], ["optim.name=paged_adamw"]),
    "nothing to do": (["task=quantize", "quant.save=false"], ["quant.save=false"]),
    "no clipping": (["train.max_grad_norm=0"], ["train.max_grad_norm=0", "null"]),
    "unreadable data": (_unreadable_data, ["data.jsonl"]),
    "empty data": (_empty_data, ["data.txt"]),
    "missing data": (["data.source=./nowhere.txt"], ["data.source", "nowhere.txt"]),
}


@pytest.mark.parametrize("case", CASES)
def test_one_message_exit_2_and_nothing_written(case: str, tmp_path: Path):
    given, expected = CASES[case]
    words = given(tmp_path) if callable(given) else given
    done = run(*SMALL, *words, root=tmp_path / "runs")
    assert done.code == 2, done.output
    assert "Traceback" not in done.output
    _, message = done.output.split("hqqtrain: error: ")
    for word in expected:
        assert word in message
    assert not (tmp_path / "runs").exists()


def test_a_directory_of_another_configuration_is_left_alone(tmp_path: Path):
    words = (*SMALL, "task=quantize", "run.name=mine")
    first = run(*words, root=tmp_path / "runs")
    assert first.code == 0, first.output
    before = {p: p.stat().st_mtime_ns for p in first.directory.rglob("*") if p.is_file()}
    other = run(*words, "quant.nbits=4", root=tmp_path / "runs")
    assert other.code == 2
    assert "quant.nbits=4" in other.output
    assert "saved: 2" in other.output
    assert {p: p.stat().st_mtime_ns for p in first.directory.rglob("*") if p.is_file()} == before
    assert json.loads((first.directory / "status.json").read_text())["status"] == "done"


def test_a_root_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    done = run(*SMALL, root=tmp_path / "file")
    assert done.code == 2, done.output
    assert "run.root" in done.output
    assert "Traceback" not in done.output


def test_a_finished_run_is_not_done_once_its_source_has_changed(tmp_path: Path):
    words = (*SMALL, "task=quantize", f"model.name_or_path={_copy(tmp_path)}")
    first = run(*words, root=tmp_path / "runs")
    assert first.code == 0, first.output
    assert "done already" in run(*words, root=tmp_path / "runs").output
    weights = tmp_path / "model" / "model.safetensors"
    weights.touch()
    assert "done already" in run(*words, root=tmp_path / "runs").output
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = run(*words, root=tmp_path / "runs")
    assert again.code == 2
    assert "changed since" in again.output
