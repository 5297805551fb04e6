"""--check looks at the model folder, the patterns and the texts, and says what it looked at."""

import json
from pathlib import Path

import pytest

from hqqtrain.cli import main


@pytest.fixture
def words(tiny_model: Path, tmp_path: Path, monkeypatch) -> list[str]:
    """Return the arguments of a run with a model and texts of its own."""
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"def f{n}(x): return x + {n}"} for n in range(30)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.txt").write_text("def g(x): return x")
    return [
        "--check", "recipe=tiny_2bit", f"model.name_or_path={tiny_model}", "data.source=mine.jsonl",
        "eval.source=held.txt", "quant.group_size=16", "run.name=run",
    ]  # fmt: skip


def test_what_was_checked_goes_to_standard_error_and_the_directory_to_standard_output(
    words, capsys, tmp_path
):
    before = sorted(tmp_path.iterdir())
    assert main(words) == 0
    output = capsys.readouterr()
    assert output.out == "runs/run\n"
    assert "hqqtrain: checked: the configuration; the run directory; model.name_or_path=" in (
        output.err
    )
    assert "7 quantized linear layers, 7 adapters" in output.err
    assert "data.source=mine.jsonl (30 texts)" in output.err
    assert sorted(tmp_path.iterdir()) == before


def test_calibration_text_is_counted(words, capsys, tmp_path):
    (tmp_path / "other.txt").write_text("def h(x): return -x")
    assert main([*words, "task=quantize", "quant.calibration=other.txt"]) == 0
    assert "quant.calibration=other.txt (1 text)" in capsys.readouterr().err


def test_only_one_rank_says_what_was_checked(words, capsys, monkeypatch):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    words = [word for word in words if not word.startswith("model.")]
    assert main([*words, "model.name_or_path=owner/model"]) == 0
    output = capsys.readouterr()
    assert (output.out, "checked" in output.err) == ("", False)


def test_a_chat_that_the_template_refuses_is_found(words, capsys, tmp_path):
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    bad = [good[0], {"role": "tool", "content": "22"}, good[1]]
    rows = "".join(json.dumps({"messages": each}) + "\n" for each in (good, good, bad))
    (tmp_path / "chat.jsonl").write_text(rows)
    words = [*words, "data.source=chat.jsonl", "eval.source=null"]
    assert main([*words, "data.chat_template=gemma"]) == 2
    assert (
        "data.source=chat.jsonl, line 3: the template gemma has the roles"
        in capsys.readouterr().err
    )
    assert main(words) == 2
    assert "data.chat_template=auto: the tokenizer of the model has no" in capsys.readouterr().err
    assert main([*words, "data.chat_template=chatml"]) == 0


@pytest.mark.parametrize("streaming", [False, True])
def test_the_refused_chats_of_every_source_are_reported_at_once(
    words, capsys, tmp_path, monkeypatch, streaming
):
    """Also that of a source after one with more chats than are encoded."""
    monkeypatch.setattr("hqqtrain.tasks.check.SHOWN_EXAMPLES", 4)
    good = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    bad = [good[0], {"role": "tool", "content": "22"}, good[1]]
    for name, chats in (("a", [good, bad]), ("b", [good] * 5), ("c", [bad, good])):
        rows = [{"messages": each} for each in chats]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [*words, "task=data", "eval.source=null", "data.chat_template=gemma"]
    words += [f"data.streaming={streaming}", "data.source=[a.jsonl,b.jsonl,c.jsonl]"]
    assert main(words) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if "warning: " not in x]
    assert len(errors) == 2
    for place, error in zip(("a.jsonl, line 2", "c.jsonl, line 1"), errors, strict=True):
        assert f"data.source={place}: the template gemma has the roles" in error
    assert main([*words, "data.max_bad_rows=1"]) == 2  # they are counted together
    error = capsys.readouterr().err.splitlines()[-1]
    assert "c.jsonl, line 1: " in error
    assert "Set data.max_bad_rows above 1" in error
    assert main([*words, "data.max_bad_rows=2"]) == 0


def test_a_held_out_chat_that_the_template_refuses_is_found(words, capsys, tmp_path):
    chat = [{"role": "tool", "content": "22"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    words = [*words, "task=data", "eval.source=held.jsonl", "data.chat_template=gemma"]
    assert main(words) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if "warning: " not in x]
    assert "eval.source=held.jsonl, line 1: the template gemma has the roles" in error


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("quant.skip=[lm_head,nope]", "quant.skip=nope: matches no linear layer"),
        ("quant.group_size=7", "quant.group_size=7"),
        ("adapter.target_modules=[nope]", "adapter.target_modules=nope"),
        ("data.source=absent.jsonl", "data.source=absent.jsonl: no such file"),
        ("data.text_field=body", "data.text_field=body"),
        ("eval.source=absent.txt", "eval.source=absent.txt: no such file"),
        ("model.name_or_path=./absent", "model.name_or_path=./absent: no such folder"),
        ("quant.calibration=absent.txt", "error: quant.calibration=absent.txt: no such file"),
        ("adapter.init_from=./absent", "absent: contains no adapter_config.json"),
    ],
)
def test_a_fault_of_an_input_is_one_message(words, capsys, override, message):
    key = override.partition("=")[0]
    kept = [word for word in words if not word.startswith(f"{key}=")]
    assert main([*kept, override]) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.out == ""


def test_all_faults_are_reported_at_once(words, capsys, tmp_path):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "notes.txt").write_text("mine")
    faults = {
        "model.name_or_path": "./no-model", "data.source": "no-text.jsonl",
        "eval.source": "no-held-out.txt", "adapter.init_from": "./no-adapter",
    }  # fmt: skip
    kept = [word for word in words if word.partition("=")[0] not in faults]
    assert main([*kept, *(f"{key}={value}" for key, value in faults.items())]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    for text in ("runs/run: contains files", *(value.lstrip("./") for value in faults.values())):
        assert sum(text in line for line in lines) == 1, text


def test_the_patterns_of_both_groups_are_checked(words, capsys):
    assert main([*words, "quant.skip=[nope]", "adapter.target_modules=[nil]"]) == 2
    errors = capsys.readouterr().err
    assert errors.count("quant.skip=nope: matches no linear layer") == 1
    assert errors.count("adapter.target_modules=nil") == 1
    assert main([*words, "quant.skip=[nope]", "adapter.target_modules=[q_proj]"]) == 2
    assert "adapter.target_modules" not in capsys.readouterr().err


def test_a_fault_of_training_and_held_out_text_is_one_line(words, capsys):
    kept = [word for word in words if not word.startswith(("data.", "eval."))]
    assert main([*kept, "data.source=absent.jsonl"]) == 2
    assert capsys.readouterr().err.count("absent.jsonl") == 1
    assert main([*kept, "data.source=python_stdlib_chat", "data.loss_on=completion"]) == 2
    assert capsys.readouterr().err.count("data.loss_on=completion") == 1


def test_bad_rows_of_every_source_and_of_the_held_out_text_are_reported_at_once(
    words, capsys, tmp_path
):
    bad, good = {"prompt": 1, "completion": "c"}, {"prompt": "p", "completion": "c"}
    for name, rows in (("a", [good, bad]), ("b", [bad]), ("c", [good, good, bad])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept = [*(x for x in words if not x.startswith(("data.", "eval."))), "task=data"]
    places = ["a.jsonl: cannot read a.jsonl, line 2", "c.jsonl: cannot read c.jsonl, line 3"]
    for sources, more in (("a.jsonl", []), ("[a.jsonl, mine.jsonl, b.jsonl]", ["b.jsonl, line 1"])):
        assert main([*kept, f"data.source={sources}", "eval.source=c.jsonl"]) == 2
        errors = [x for x in capsys.readouterr().err.splitlines() if "warning: " not in x]
        assert len(errors) == 2 + len(more)
        assert all(sum(place in x for x in errors) == 1 for place in (*places, *more)), errors


def test_a_refused_chat_is_reported_beside_a_bad_held_out_row(words, capsys, tmp_path):
    chat = [{"role": "tool", "content": "22"}, {"role": "assistant", "content": "A"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    (tmp_path / "held.jsonl").write_text("no json\n")
    kept = [*(x for x in words if not x.startswith(("data.", "eval."))), "task=data"]
    kept += ["data.source=chat.jsonl", "eval.source=held.jsonl", "data.chat_template=gemma"]
    assert main(kept) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if "warning: " not in x]
    assert len(errors) == 2
    for fault in (
        "data.source=chat.jsonl, line 1: the template gemma has the roles",
        "eval.source=held.jsonl: cannot read held.jsonl, line 1",
    ):
        assert sum(fault in line for line in errors) == 1, errors


def test_the_faults_of_all_jobs_of_a_sweep_are_reported(words, capsys):
    kept = [word for word in words if not word.startswith(("data.source", "run.name"))]
    assert main([*kept, "-m", "data.source=absent1.jsonl,mine.jsonl,absent2.jsonl"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " not in line]
    assert ["absent1" in lines[0], "absent2" in lines[1], len(lines)] == [True, True, 2]


def test_an_adapter_is_checked_although_its_model_is_on_the_hub(words, capsys):
    kept = [word for word in words if not word.startswith("model.")]
    hub = ["model.name_or_path=owner/model", "adapter.init_from=./absent"]
    assert main([*kept, *hub]) == 2
    assert "adapter.init_from=absent: contains no adapter_config.json" in capsys.readouterr().err


def test_a_damaged_model_is_found(words, tiny_model: Path, capsys):
    (tiny_model / "model.safetensors").write_bytes(b"no weights")
    assert main(words) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_directory_of_another_run_is_found(words, tmp_path: Path, capsys):
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "runs" / "run" / "notes.txt").write_text("mine")
    assert main(words) == 2
    assert "runs/run: contains files, but no run" in capsys.readouterr().err


def test_the_hub_is_not_asked(words, capsys):
    kept = [word for word in words if not word.startswith(("model.", "data."))]
    hub = ["model.name_or_path=owner/model", "data.source=owner/texts", "data.format=auto"]
    assert main([*kept, *hub, "hub.push=alice/x"]) == 0
    errors = capsys.readouterr().err
    assert "model.name_or_path=owner/model is on the hub and was not checked" in errors
    assert "data.source=owner/texts is on the hub and was not checked" in errors
    assert "hub.push=alice/x is on the hub and was not checked" in errors


def test_all_faults_of_the_layers_are_reported_at_once(words, capsys):
    faults = ["quant.skip=[nope,no]", "quant.group_size=7", "adapter.target_modules=[nil,none]"]
    overrides = "quant.overrides={not:{nbits:2},q_proj:{group_size:9},k_proj:{group_size:9}}"
    assert main([*words, *faults, overrides]) == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [x.removeprefix("hqqtrain: error: ") for x in lines if not x.startswith("warning: ")]
    begins = (
        "quant.skip=nope", "quant.skip=no:", "quant.overrides=not", "quant.group_size=7",
        "quant.group_size=9", "adapter.target_modules=nil", "adapter.target_modules=none",
    )  # fmt: skip
    assert len(lines) == len(begins)
    assert all(sum(line.startswith(begin) for line in lines) == 1 for begin in begins)


def test_the_message_about_a_configuration_says_what_was_not_checked(words, capsys):
    note = "The model, the texts and the run directory are only checked once"
    assert main([*words, "quant.nbits=5"]) == 2
    assert capsys.readouterr().err.splitlines()[1].startswith(note)
    assert main([*words[1:], "quant.nbits=5"]) == 2
    assert note not in capsys.readouterr().err
