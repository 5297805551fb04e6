"""The check of a whole configuration, and the run name that it gives."""

import subprocess
import sys

import pytest
from refused_configs import refusal

from hqqtrain.common.errors import UserError
from hqqtrain.config.groups import DataConfig, EvalConfig, TrainConfig
from hqqtrain.config.infra import CheckpointConfig
from hqqtrain.config.run import RunConfig


def test_the_defaults_are_sound():
    RunConfig().check()


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("quant", "nbits", 5, "quant.nbits=5: allowed are 8, 4, 3, 2, 1, null."),
        ("quant", "group_size", 1, "quant.group_size=1: must be at least 2."),
        ("quant", "axis", 2, "quant.axis=2: allowed are 0, 1."),
        (
            "quant",
            "solver",
            "magic",
            "quant.solver=magic: allowed are auto, least_squares, gptq, hqq, rtn.",
        ),
        ("adapter", "r", 0, "adapter.r=0: must be at least 1."),
        ("adapter", "dropout", 1.0, "adapter.dropout=1.0: must be below 1."),
        ("adapter", "kind", "none", "adapter.kind=none: task=finetune trains an adapter"),
        ("data", "validation", 0.0, "data.validation=0.0: must be above 0 and below 1"),
        ("data", "validation", 1.0, "data.validation=1.0: must be above 0 and below 1"),
        ("optim", "lr", float("nan"), "optim.lr=nan: must be finite."),
        ("optim", "lr", float("inf"), "optim.lr=inf: must be finite."),
        ("optim", "lr", -1e-4, "optim.lr=-0.0001: must be at least 0."),
        ("parallel", "strategy", "ddpp", "allowed are auto, single, ddp, fsdp2, fsdp1, zero3."),
        (
            "track",
            "backends",
            ["mlflow"],
            "[mlflow]: allowed are wandb, tensorboard",
        ),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(group, name, value, expected):
    assert expected in refusal(**{group: {name: value}})


def test_all_errors_are_reported_at_once():
    message = refusal(quant={"nbits": 5, "axis": 7}, adapter={"r": 0})
    assert len(message.splitlines()) == 3


def test_bf16_adapters_with_fp16_loss_scaling_arerefusal():
    config = RunConfig()
    config.adapter.dtype, config.train.precision = "bf16", "fp16"
    with pytest.raises(UserError, match=r"adapter\.dtype=bf16: .*train\.precision=fp16"):
        config.check()


def test_the_number_of_recomputed_layers_does_not_change_the_name_of_a_run():
    modes = (True, "auto", "full", "offload", 1, 7)
    names = {RunConfig(train=TrainConfig(activation_checkpointing=m)).run_name() for m in modes}
    assert names == {RunConfig().run_name()}
    off, none = (
        RunConfig(train=TrainConfig(activation_checkpointing=mode)) for mode in (False, "none")
    )
    assert off.run_name() == none.run_name() not in names, "as in earlier releases"


def test_eval_needs_a_text():
    config = RunConfig(task="eval")
    config.eval.source = None
    with pytest.raises(UserError, match=r"eval\.source=null: task=eval needs a text"):
        config.check()


def test_root_and_trackers_do_not_change_the_name():
    config = RunConfig(recipe="tiny_2bit")
    config.run.root, config.track.backends, config.track.project = "/elsewhere", [], "other"
    assert config.run_name() == RunConfig(recipe="tiny_2bit").run_name()


@pytest.mark.parametrize(
    ("group", "name", "value"),
    [
        ("quant", "nbits", 3),
        ("quant", "overrides", {"*.q_proj": None}),
        ("train", "seed", 1),
        ("optim", "lr", 3e-4),
        ("model", "revision", "main"),
        ("eval", "tokens", 1024),
        ("eval", "protocol", "hqq"),
    ],
)
def test_every_key_that_defines_the_result_changes_the_name(group, name, value):
    config = RunConfig()
    setattr(getattr(config, group), name, value)
    assert config.run_name() != RunConfig().run_name()


def test_automatic_held_out_text_has_the_name_of_the_source_that_it_stands_for():
    names = {RunConfig(eval=EvalConfig(source=s)).identity() for s in ("auto", "python_stdlib")}
    assert len(names) == 1
    assert RunConfig(eval=EvalConfig(source="mine")).identity() not in names
    mine = DataConfig(source="mine")
    other = RunConfig(data=mine), RunConfig(data=mine, eval=EvalConfig(source="python_stdlib"))
    assert other[0].identity() != other[1].identity()


def test_a_look_at_the_data_of_a_run_has_a_directory_of_its_own():
    config = RunConfig(task="data")
    config.run.name = "mine"
    assert config.run_name() == "mine-data"
    config.task = "finetune"
    assert config.run_name() == "mine"


def test_the_number_of_shown_examples_changes_no_result():
    config = RunConfig()
    config.data.show = 9
    assert config.identity() == RunConfig().identity()


def test_task_changes_the_name():
    assert RunConfig(task="eval").run_name() != RunConfig().run_name()


def test_the_name_is_recipe_or_task_and_a_short_hash():
    assert RunConfig(recipe="mine").run_name() == f"mine-{RunConfig().identity()[:8]}"
    assert RunConfig(task="quantize").run_name().startswith("quantize-")


def test_the_order_of_overrides_does_not_matter():
    one, other = RunConfig(), RunConfig()
    one.quant.overrides = {"a": None, "b": {"nbits": 8, "axis": 0}}
    other.quant.overrides = {"b": {"axis": 0, "nbits": 8}, "a": None}
    assert one.identity() == other.identity()


def test_the_name_is_the_same_in_another_process():
    program = "from hqqtrain.config.run import RunConfig; print(RunConfig().identity())"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {RunConfig().identity()}


@pytest.mark.parametrize(
    ("group", "values", "message"),
    [
        ("train", {"epochs": 1e308}, "train.epochs=1e+308: must be at most 1,000,000."),
        ("train", {"max_steps": 10**30}, "must be below 2^63."),
        ("eval", {"tokens": 2**63}, "eval.tokens=9223372036854775808: must be below 2^63."),
    ],
)
def test_numbers_that_no_run_can_have(group, values, message):
    assert message in refusal(**{group: values})


def test_keys_of_later_releases_change_the_identity_only_if_they_are_set():
    default = RunConfig()
    best = RunConfig(ckpt=CheckpointConfig(load_best=True))
    patient = RunConfig(train=TrainConfig(early_stopping_patience=3))
    kept = RunConfig(ckpt=CheckpointConfig(keep_best=1))
    identities = [config.identity() for config in (default, best, patient)]
    assert len(set(identities)) == 3
    assert kept.identity() == default.identity()


@pytest.mark.parametrize(
    ("group", "key", "value"),
    [
        ("ckpt", "keep_best", 1),
        ("ckpt", "load_best", True),
        ("train", "early_stopping_patience", 3),
    ],
)
def test_what_needs_evaluations_is_refused_without_them(group: str, key: str, value):
    config = RunConfig()
    setattr(getattr(config, group), key, value)
    with pytest.raises(UserError, match=rf"{group}\.{key}=.*set eval\.every and eval\.source"):
        config.check()
    config.eval.every = 10
    config.check()
