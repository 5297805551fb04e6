"""A stand-in for the package `lm_eval` with the part of its API that we use.

The real one is large and no dependency of the tests. Its tasks are of one kind here: which of two
continuations of a text is more likely.
"""

import json
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

NAMES = ["arc_easy", "piqa", "unreachable"]


class Task:
    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.eval_docs = [json.loads(row) for row in Path(config["data"]).read_text().splitlines()]

    def get_config(self, key: str) -> Any:
        return self.config.get(key)

    def set_config(self, key: str, value: Any) -> None:
        self.config[key] = value

    def set_fewshot_seed(self, seed: int) -> None:
        self.config["seed"] = seed


class TaskManager:
    def __init__(self, include_path: Path | None = None, include_defaults: bool = True) -> None:
        files = sorted(include_path.glob("*.yaml")) if include_path else []
        self.task_index = {
            yaml.safe_load(file.read_text())["task"]: SimpleNamespace(yaml_path=file)
            for file in files
        }
        self.all_subtasks = list(self.task_index)
        self.all_tasks = [*self.all_subtasks, *NAMES * include_defaults]

    def load(self, specs: list[str]) -> dict[str, Any]:
        if specs == ["unreachable"]:
            raise ConnectionError("the hub does not answer")
        tasks = [Task(yaml.safe_load(Path(spec).read_text())) for spec in specs]
        return {"tasks": {task.config["task"]: task for task in tasks}, "groups": {}}


class HFLM:
    def __init__(self, pretrained: Any, backend: str, tokenizer: Any, batch_size: int) -> None:
        assert (backend, hasattr(pretrained, "config")) == ("causal", True)
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self._rank, self._world_size = 0, 1

    rank = property(lambda self: self._rank)
    world_size = property(lambda self: self._world_size)

    def loglikelihood(self, requests: list[tuple[str, str]], disable_tqdm: bool) -> list[float]:
        assert disable_tqdm
        return [self._loglikelihood(*request) for request in requests]

    def _loglikelihood(self, context: str, continuation: str) -> float:
        before, after = (
            self.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (context, continuation)
        )
        tokens = torch.tensor([before + after])
        log_p = self._model_call(tokens[:, :-1]).float().log_softmax(-1)[0, -len(after) :]
        return float(log_p.gather(-1, tokens[0, -len(after) :, None]).sum())


def evaluate(lm: Any, loaded: Any, bootstrap_iters: int, log_samples: bool) -> Any:
    assert (bootstrap_iters > 0, log_samples) == (True, False)
    found: dict[str, dict[str, Any]] = {
        "results": {},
        "versions": {},
        "n-shot": {},
        "n-samples": {},
    }
    for name, task in loaded["tasks"].items():
        if task.config.get("unsafe"):
            raise ValueError("Attempted to run task: which is marked as unsafe.")
        mine = task.eval_docs[lm.rank :: lm.world_size]
        scores = lm.loglikelihood(
            [(doc["text"], choice) for doc in mine for choice in doc["choices"]], disable_tqdm=False
        )
        right = [a > b for a, b in zip(scores[::2], scores[1::2], strict=True)]
        lm.barrier()
        gathered = lm.gather_object(right) if lm.world_size > 1 else [right]
        if gathered is None:
            continue
        right = [value for part in gathered for value in part]
        found["results"][name] = {
            "alias": name, "sample_len": len(right), "acc,none": sum(right) / len(right),
            "acc_stderr,none": "N/A", "acc,strict": 0.5,
        }  # fmt: skip
        found["n-shot"][name] = task.config["num_fewshot"]
        found["n-samples"][name] = {"effective": len(right)}
    return found if lm.rank == 0 else None


def install() -> None:
    """Put the modules where `import lm_eval...` finds them."""
    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.tasks": {"TaskManager": TaskManager},
        "lm_eval.evaluator": {"evaluate": evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
    }
    for name, attributes in contents.items():
        module = ModuleType(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        vars(module).update(attributes)
        sys.modules[name] = module
    sys.modules.pop("hqqtrain.evaluation.harness_model", None)


@pytest.fixture
def fake_lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace lm_eval, whether or not it is installed."""
    before = {name: module for name, module in sys.modules.items() if _is_ours(name)}
    for name in before:
        del sys.modules[name]
    install()
    for module in ("evaluation.harness", "rundir.schema"):
        monkeypatch.setattr(f"hqqtrain.{module}.version", lambda _: "0.4.13")
    yield
    for name in [name for name in sys.modules if _is_ours(name)]:
        del sys.modules[name]
    sys.modules.update(before)


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] == "lm_eval" or name == "hqqtrain.evaluation.harness_model"


def write_task(folder: Path, name: str = "mine", documents: int = 5, **settings: Any) -> Path:
    """Write a task of the stand-in, and return its YAML file."""
    rows = [{"text": f"def f{i}(x):", "choices": [" return", " x x x"]} for i in range(documents)]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"task": name, "data": str(data), **settings}))
    return file
