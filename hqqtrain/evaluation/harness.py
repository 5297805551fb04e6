"""Find the tasks of lm-evaluation-harness that a run names, and measure a model in memory on them.

The package `lm_eval` is an extra, which is imported only here and in `harness_model.py`, and only
if `eval.harness` names a task. It compares whole requests, so its figures are those that
`lm_eval --model hf` computes.
"""

import importlib.util
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError, describe_error, did_you_mean
from hqqtrain.distributed.comm import Communicator

BOOTSTRAP_SAMPLES = 1000
"""Samples for the standard error of a metric that is no mean."""

SEED = 1234
"""Seed of the examples in prompts and of sampled tokens, that of lm-evaluation-harness."""

_ERRORS_OF_TASKS = (
    ValueError,
    AssertionError,
    LookupError,
    TypeError,
    AttributeError,
    TemplateError,
)
"""Errors of the templates, functions and rows of a task, which lm_eval raises as they are."""

TaskFigures = dict[str, dict[str, float]]
"""Figures by task: its metrics and their `_stderr`, `n_shot`, `documents` and `version`."""


@dataclass(frozen=True)
class HarnessTask:
    """A value of `eval.harness`, whose data is loaded.

    Attributes:
        name: The value: a name or a path.
        loaded: Its tasks and groups, as `TaskManager.load` returns them.
    """

    name: str
    loaded: Mapping[str, Any]


def find_tasks(names: Sequence[str]) -> tuple[Any, dict[str, list[str]]]:
    """Return a `TaskManager`, and what its `load` takes for each of `names`. No data is loaded.

    Args:
        names: Names of tasks, groups or tags, or paths of YAML files or of folders of them.

    Raises:
        UserError: lm_eval is not installed, a path does not exist or has no task, or no task has
            the name.
    """
    _check_is_installed(names)
    from lm_eval.tasks import TaskManager

    with _quiet():
        paths = {name: Path(name).expanduser() for name in names if _is_path(name)}
        manager = TaskManager(include_defaults=len(paths) < len(names))
        specs = {}
        for name in names:
            if name in paths:
                specs[name] = _tasks_of_path(name, paths[name])
            elif name in manager.all_tasks:
                specs[name] = [name]
            else:
                raise UserError(
                    f"eval.harness={name}: lm-evaluation-harness {version('lm_eval')} has no task, "
                    f"group or tag of this name.{did_you_mean(name, manager.all_tasks)} "
                    "`lm_eval ls tasks` lists them; a task of your own is a path to a YAML file."
                )
    return manager, specs


def load_tasks(names: Sequence[str]) -> list[HarnessTask]:
    """Load the tasks of `eval.harness` with their data.

    Raises:
        UserError: As for `find_tasks`, or a task or its data cannot be loaded.
    """
    manager, specs = find_tasks(names)
    tasks = []
    for name, spec in specs.items():
        try:
            with _quiet():
                loaded = manager.load(spec)
        except Exception as error:  # of YAML, of the code of a task, of `datasets` or of the hub
            raise UserError(
                f"eval.harness={name}: the task or its data cannot be loaded: "
                f"{describe_error(error)}"
            ) from error
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=SEED)
        tasks.append(HarnessTask(name, loaded))
    return tasks


def evaluate_task(
    model: nn.Module,
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    comm: Communicator,
    *,
    batch_size: int,
    on_batch: Callable[[], object] = lambda: None,
) -> TaskFigures:
    """Measure `model` on a task; the ranks share its documents. Collective.

    Args:
        model: Causal language model, a full copy on every rank.
        config: Its configuration, which tells the longest sequence.
        tokenizer: Its tokenizer; a padding token may be added.
        task: The task.
        comm: All ranks of the run.
        batch_size: Requests per batch.
        on_batch: Called before every batch of this rank; it may raise to stop.

    Returns:
        The figures of each task and group, the same on all ranks.

    Raises:
        UserError: The task does not fit the model, has a fault, or would run code from its data.
    """
    from lm_eval.evaluator import evaluate

    from hqqtrain.evaluation.harness_model import InMemoryModel

    documents = [len(each.eval_docs) for each in task.loaded["tasks"].values()]
    shares = min(documents, default=0) >= comm.size  # each rank must have a document of each task
    was_training = model.training
    model.eval()
    devices = [comm.device] if comm.device.type == "cuda" else []
    # Its progress bars go to the standard error, where those of the run are.
    with _quiet(), torch.random.fork_rng(devices), redirect_stderr(io.StringIO()):
        torch.manual_seed(SEED)
        lm = InMemoryModel(model, config, tokenizer, comm, batch_size, on_batch, shares=shares)
        try:
            found = evaluate(lm, task.loaded, bootstrap_iters=BOOTSTRAP_SAMPLES, log_samples=False)
        except _ERRORS_OF_TASKS as error:
            raise UserError(f"eval.harness={task.name}: {describe_error(error)}") from error
    model.train(was_training)
    return comm.run_on_rank0(lambda: _figures(found))


def _figures(found: Mapping[str, Any]) -> TaskFigures:
    """Return the figures in the result of lm_eval: `acc,none` becomes `acc`."""
    figures: TaskFigures = {}
    for name, values in {**found["results"], **found.get("groups", {})}.items():
        own: dict[str, Any] = {}
        for key, value in values.items():
            metric, _, filter_name = key.partition(",")
            if filter_name:
                suffix = "" if filter_name == "none" else f", {filter_name}"
                own[f"{metric}{suffix}"] = value
        own["n_shot"] = found.get("n-shot", {}).get(name)
        own["version"] = found.get("versions", {}).get(name)
        own["documents"] = found.get("n-samples", {}).get(name, {}).get("effective")
        numbers = {k: v for k, v in own.items() if isinstance(v, int | float)}
        figures[name] = {key: float(value) for key, value in numbers.items()}
    return figures


def _check_is_installed(names: Sequence[str]) -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"eval.harness=[{','.join(names)}]: the package lm_eval is not installed; "
            "pip install 'hqqtrain[harness]'."
        )


def _is_path(name: str) -> bool:
    path = Path(name).expanduser()
    return "/" in name or path.suffix in (".yaml", ".yml") or path.is_dir()


def _tasks_of_path(name: str, path: Path) -> list[str]:
    """Return the path of a YAML file, or those of all tasks in a folder."""
    from lm_eval.tasks import TaskManager

    if path.is_file():
        return [str(path)]
    if not path.is_dir():
        raise UserError(f"eval.harness={name}: no such file or folder.")
    index = TaskManager(include_path=path, include_defaults=False)
    if not index.all_subtasks:
        raise UserError(f"eval.harness={name}: no YAML file in the folder has a task.")
    return [str(index.task_index[task].yaml_path) for task in index.all_subtasks]


@contextmanager
def _quiet() -> Iterator[None]:
    """Let lm_eval log errors only, start no processes, and download no metrics, which are code."""
    for variable in ("DISABLE_MULTIPROC", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(variable, "1")
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
