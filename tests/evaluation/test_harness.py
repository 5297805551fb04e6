"""Tasks of lm-evaluation-harness are found and loaded, and their figures are the same on all ranks.

Most tests use a stand-in for the package. The last one compares with the real one, if installed.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from fake_lm_eval import fake_lm_eval, install, write_task
from ranks import on_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hqqtrain.common.errors import PreemptedError, UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS, Communicator
from hqqtrain.evaluation import harness
from hqqtrain.evaluation.harness import evaluate_task, find_tasks, load_tasks
from hqqtrain.models.source import TINY_FOLDER

__all__ = ["fake_lm_eval"]


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.3,
        max_position_embeddings=512,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def evaluate(name: str, comm: Communicator = SINGLE_PROCESS, **settings):
    model = make_model().train()
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    (task,) = load_tasks([name])
    figures = evaluate_task(model, model.config, tokenizer, task, comm, batch_size=2, **settings)
    assert model.training
    return figures


def test_a_missing_package_is_an_error_with_its_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"eval\.harness=\[a,b\]: .*pip install 'hqqtrain\[harness"):
        find_tasks(["a", "b"])


@pytest.mark.usefixtures("fake_lm_eval")
def test_tasks_are_names_files_and_folders(tmp_path):
    file = write_task(tmp_path)
    write_task(tmp_path, "other")
    _, specs = find_tasks(["piqa", str(file), str(tmp_path)])
    files = [str(tmp_path / "mine.yaml"), str(tmp_path / "other.yaml")]
    assert list(specs.values()) == [["piqa"], files[:1], files]
    (task,) = load_tasks([str(tmp_path)])
    assert list(task.loaded["tasks"]) == ["mine", "other"]


@pytest.mark.usefixtures("fake_lm_eval")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("arc_esay", "has no task, group or tag of this name. Did you mean 'arc_easy'?"),
        ("missing.yaml", "no such file or folder"),
        ("empty/", "no YAML file in the folder has a task"),
        ("unreachable", "cannot be loaded: ConnectionError: the hub does not answer"),
    ],
)
def test_what_cannot_be_found_or_loaded_is_named(tmp_path, monkeypatch, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        load_tasks([name])
    assert str(caught.value).startswith(f"eval.harness={name}: ")
    assert reason in str(caught.value)


@pytest.mark.usefixtures("fake_lm_eval")
def test_the_figures_of_a_task(tmp_path):
    figures = evaluate(str(write_task(tmp_path, num_fewshot=2)))
    accuracy = figures["mine"].pop("acc")
    assert 0 <= accuracy <= 1
    assert figures == {"mine": {"acc, strict": 0.5, "n_shot": 2.0, "documents": 5.0}}


@pytest.mark.usefixtures("fake_lm_eval")
def test_a_task_that_does_not_fit_is_refused_and_a_run_can_stop(tmp_path):
    with pytest.raises(
        UserError, match=r"eval\.harness=.*mine\.yaml: ValueError: Attempted to run"
    ):
        evaluate(str(write_task(tmp_path, unsafe=True)))

    file = write_task(tmp_path)
    data = Path(yaml.safe_load(file.read_text())["data"])
    data.write_text(data.read_text() + '{"text": "a row without choices"}\n')
    with pytest.raises(UserError, match=r"eval\.harness=.*mine\.yaml: KeyError: 'choices'"):
        evaluate(str(file))

    def stop() -> None:
        raise PreemptedError("SIGTERM was received")

    with pytest.raises(PreemptedError):
        evaluate(str(write_task(tmp_path)), on_batch=stop)


def _check_ranks(_: int, comm: Communicator, folder: Path, expected: dict) -> None:
    install()
    for name, figures in expected.items():
        found = evaluate(str(folder / f"{name}.yaml"), comm)
        assert found == figures, (found, figures)


@pytest.mark.ranks
@pytest.mark.usefixtures("fake_lm_eval")
def test_two_ranks_share_the_documents(tmp_path):
    """A task with fewer documents than ranks is computed by each of them."""
    for name, documents in (("mine", 5), ("single", 1)):
        write_task(tmp_path, name, documents)
    expected = {name: evaluate(str(tmp_path / f"{name}.yaml")) for name in ("mine", "single")}
    assert [figures[name]["documents"] for name, figures in expected.items()] == [5, 1]
    assert on_ranks(_check_ranks, 2, tmp_path, expected) == ["", ""]


def _write_real_tasks(folder: Path) -> None:
    rows = [
        {"question": f"def f{i}(x):", "choices": [f" {i}", " the", " x + y"], "answer": i % 3}
        for i in range(6)
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }  # fmt: skip
    own = {
        "choice": {
            "output_type": "multiple_choice", "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 2.0},
        },
        "generation": {
            "output_type": "generate_until", "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"max_gen_toks": 4, "until": ["\n"]},
            "metric_list": [{"metric": "exact_match"}],
        },
        "rolling": {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{question}} {{choices[2]}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, settings in own.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **settings}))


def test_the_figures_are_those_of_the_package(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import evaluate as evaluate_real
    from lm_eval.models.huggingface import HFLM

    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    _write_real_tasks(tmp_path)
    found = evaluate(str(tmp_path))
    assert {name: figures["documents"] for name, figures in found.items()} == {
        "choice": 6, "generation": 6, "rolling": 6,
    }  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(TINY_FOLDER)
    real = HFLM(pretrained=make_model(), backend="causal", tokenizer=tokenizer, batch_size=2)
    (task,) = load_tasks([str(tmp_path)])
    expected = harness._figures(evaluate_real(real, task.loaded, log_samples=False))
    assert found == expected
    assert found["choice"]["acc_norm_stderr"] > 0
    assert found["choice"]["version"] == 2
