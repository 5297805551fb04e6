"""The record of a run is told without the paths of this machine."""

import json
from pathlib import Path

import pytest
import yaml

from hqqtrain.tasks.pushed_run import PushedRun, hub_name, without_folders


def _run(folder: Path, model: str, command: list[str], **summary) -> Path:
    folder.mkdir(parents=True)
    settings = {
        "model": {"name_or_path": model, "revision": None, "source": "pretrained"},
        "run": {"root": str(folder.parent)}, "data": {"source": ["/data/chats/x.jsonl", "y"]},
        "command": ["python", "-m", "hqqtrain", *command],
        "versions": {"python": "3.11", "hqqtrain": "0.1.0", "torch": "2.13"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_a_model_of_the_hub(tmp_path):
    words = ["recipe=tiny_2bit", "quant.nbits=3", "run.root=/secret/runs", "hub.push=alice/x",
             "track.backends=[]"]  # fmt: skip
    run = PushedRun.read(_run(tmp_path / "run", "meta/base", words))
    assert (run.base, run.hub_base, run.local_base) == ("meta/base", "meta/base", None)
    assert run.commands == ["python -m hqqtrain recipe=tiny_2bit quant.nbits=3"]
    assert run.versions == {"hqqtrain": "0.1.0", "torch": "2.13"}
    assert {"/data/chats/x.jsonl", str(tmp_path)} <= set(run.paths)


def test_a_run_is_followed_to_the_model_that_it_started_from(tmp_path):
    model = tmp_path / "Llama"
    model.mkdir()
    first = _run(tmp_path / "first", str(model), [f"model.name_or_path={model}"],
                 eval={"dataset": "text", "final": {"perplexity": 2.0}})  # fmt: skip
    (first / "quantized").mkdir()
    name = f"{first}/quantized"
    second = _run(tmp_path / "second", name, ["task=export", f"model.name_or_path={name}"])
    run = PushedRun.read(second)
    assert (run.base, run.hub_base, run.local_base) == ("Llama", None, model)
    assert run.commands == [
        "python -m hqqtrain model.name_or_path=.../Llama",
        "python -m hqqtrain task=export model.name_or_path=.../quantized",
    ]
    assert run.evaluated.eval.final.perplexity == 2.0
    assert str(model) in run.paths


def test_no_run_is_followed_for_ever(tmp_path):
    _run(tmp_path / "run", str(tmp_path / "run"), [])
    assert len(PushedRun.read(tmp_path / "run").commands) < 20
    assert PushedRun.read(tmp_path / "none").base == ""


def test_secrets_of_a_command_are_masked(tmp_path):
    words = ["data.source=https://x/y?token=abcdefgh", "model.name_or_path=/my models/x y"]
    (command,) = PushedRun.read(_run(tmp_path / "run", "tiny", words)).commands
    assert "abcdefgh" not in command
    assert "'model.name_or_path=.../x y'" in command


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/data/alice/x.jsonl", ".../x.jsonl"),
        ("[/data/alice/x.jsonl,~/data/y.txt]", "[.../x.jsonl,.../y.txt]"),
        ("{path:../z/chats.jsonl,weight:2}", "{path:.../chats.jsonl,weight:2}"),
        ("owner/name:config", "owner/name:config"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("runs/mine", "runs/mine"),
        ("0.5", "0.5"),
    ],
)
def test_folders_are_left_out(text, expected):
    assert without_folders(text) == expected


def test_folders_of_relative_paths_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients" / "acme").mkdir(parents=True)
    text = "data.source={a:clients/acme,b:owner/name,c:file:///data/bob/x}"
    assert without_folders(text) == "data.source={a:.../acme,b:owner/name,c:.../x}"


def test_names_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    for name, expected in (("owner/name", "owner/name"), ("gpt2", "gpt2"), ("tiny", None),
                           ("local", None), ("/no/such", None), ("a/b/c", None)):  # fmt: skip
        assert hub_name({"name_or_path": name, "source": "pretrained"}) == expected
    assert hub_name({"name_or_path": "owner/name", "source": "synthetic"}) is None
