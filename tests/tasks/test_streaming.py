"""A training on streamed data: its files, its checkpoints, and its errors before any work."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hqqtrain.common.errors import DataError, PreemptedError, UserError
from hqqtrain.data.streaming.loader import GlobalBatch, StreamingLoader
from hqqtrain.tasks.data import show_data
from hqqtrain.tasks.finetune import finetune


@pytest.fixture
def rows(tmp_path: Path) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": f"def f_{i}(x): return {i} * x"}) + "\n"
                            for i in range(60)))  # fmt: skip
    return str(file)


@pytest.fixture
def train(make_config, start_run, rows):
    """Return a function that trains for three steps, and returns the losses and the adapter."""

    def run_named(name: str, every: int | None = 1, **data: object) -> tuple[list[float], dict]:
        settings = {"source": rows, "streaming": True, "shuffle_buffer": 4} | data
        config = make_config(
            data=settings, run={"name": name}, train={"max_steps": 3}, ckpt={"every": every}
        )
        with start_run(config) as run:
            finetune(run)
            folder = run.layout.folder
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        return losses, {name: tensor.tolist() for name, tensor in tensors.items()}

    return run_named


def test_a_buffer_for_all_data_gives_the_bits_of_a_training_without_streaming(train):
    assert train("streamed", shuffle_buffer=1000) == train("memory", streaming=False)


def test_a_run_that_stops_while_it_waits_for_data_has_saved_its_steps(train, monkeypatch, tmp_path):
    whole = train("whole")
    read = StreamingLoader._read

    def read_until_the_signal(loader: StreamingLoader, batch_index: int) -> GlobalBatch:
        if batch_index == 2:
            raise PreemptedError("SIGTERM was received")
        return read(loader, batch_index)

    with monkeypatch.context() as patch:
        patch.setattr(StreamingLoader, "_read", read_until_the_signal)
        with pytest.raises(PreemptedError):
            train("stopped", every=None)
    (folder,) = (tmp_path / "runs" / "stopped" / "checkpoints").iterdir()
    assert folder.name == "step-00000002"
    state = json.loads((folder / "state.json").read_text())["loader"]
    assert (state["batch_index"], state["state"]["block"], state["sequence"]) == (2, 0, 4)
    assert train("stopped", every=None) == whole


def test_other_files_are_refused_when_the_run_resumes(train, make_config, start_run, rows):
    train("run")
    with Path(rows).open("a") as file:
        file.write('{"text": "one more"}\n')
    data = {"source": rows, "streaming": True, "shuffle_buffer": 4}
    config = make_config(data=data, train={"max_steps": 4})
    with start_run(config) as run, pytest.raises(UserError, match=r"other text than data\.source"):
        finetune(run)


def test_a_bad_row_ends_the_run_before_anything_is_quantized(train, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 7}\n')
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        train("run", source=str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "runs" / "run" / "quantized").exists()


def test_a_run_that_met_a_bad_row_resumes_if_bad_rows_are_allowed(train, tmp_path, monkeypatch):
    monkeypatch.setattr("hqqtrain.data.streaming.sources.COMPARED_CHARACTERS", 100)
    lines = [json.dumps({"prompt": f"def f_{i}(x):", "completion": " return x"}) for i in range(60)]
    lines[25] = '{"prompt": 7, "completion": "x"}'
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="line 26"):
        train("run", every=None)
    assert (tmp_path / "runs" / "run" / "checkpoints" / "step-00000002").exists()
    losses, _ = train("run", every=None, max_bad_rows=1)
    assert len(losses) == 3


def test_the_first_examples_are_shown(make_config, start_run, rows, capsys, monkeypatch):
    monkeypatch.setattr("hqqtrain.data.streaming.sources.SHOWN_EXAMPLES", 7)
    Path(rows).write_text(Path(rows).read_text() + "{\n")  # the end is not read
    config = make_config("data", data={"source": rows, "streaming": True}, eval={"source": None})
    with start_run(config) as run:
        show_data(run)
    assert "example 1 of 7" in capsys.readouterr().out
