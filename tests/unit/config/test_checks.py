"""The limits of every config key and the messages about them."""

import pytest

from hqqtrain.config import LaunchConfig, QuantConfig, RunConfig, UserError, did_you_mean


def _refused(**groups) -> str:
    """Return the message of `RunConfig.check` after setting the given keys of each group."""
    config = RunConfig()
    for group, values in groups.items():
        for name, value in values.items():
            setattr(getattr(config, group), name, value)
    with pytest.raises(UserError) as caught:
        config.check()
    return str(caught.value)


def test_the_defaults_are_sound():
    RunConfig().check()


@pytest.mark.parametrize(
    ("group", "name", "value", "expected"),
    [
        ("quant", "nbits", 5, "quant.nbits=5: allowed are 8, 4, 3, 2, 1."),
        ("quant", "group_size", 1, "quant.group_size=1: must be at least 2."),
        ("quant", "axis", 2, "quant.axis=2: allowed are 0, 1."),
        ("quant", "solver", "magic", "quant.solver=magic: allowed are least_squares, hqq, rtn."),
        ("adapter", "r", 0, "adapter.r=0: must be at least 1."),
        ("adapter", "dropout", 1.0, "adapter.dropout=1.0: must be below 1."),
        ("adapter", "kind", "none", "adapter.kind=none: task=finetune trains an adapter"),
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
    assert expected in _refused(**{group: {name: value}})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"nodes": 2}, "launch.nodes=2: only applies to Slurm; add launch=slurm."),
        ({"dry_run": True}, "launch.dry_run=True: only applies to Slurm; add launch=slurm."),
        (
            {"backend": "slurm", "time": "0:02:00"},
            "launch.grace=120: must be shorter than launch.time=0:02:00.",
        ),
        (
            {"backend": "slurm", "gpus_per_node": 8, "tasks_per_node": 1},
            "launch.tasks_per_node=1: must be one process for each of launch.gpus_per_node=8",
        ),
    ],
)
def test_slurm_keys_without_effect_are_refused(values, expected):
    assert expected in _refused(launch=values)


@pytest.mark.parametrize(
    ("group", "name"),
    [("run", "root"), ("launch", "partition"), ("launch", "account"), ("launch", "options")],
)
@pytest.mark.parametrize("broken", ["a\nb", "a\r", "\x00", "a\tb", "a\x85b", "a\u2028b"])
def test_values_in_a_batch_script_must_be_a_single_line(group, name, broken):
    value = [f"--x={broken}"] if name == "options" else broken
    config = RunConfig(launch=LaunchConfig(backend="slurm"))
    setattr(getattr(config, group), name, value)
    with pytest.raises(UserError, match=rf"^{group}\.{name}='.*': must not contain line breaks"):
        config.check()


@pytest.mark.parametrize("name", ["partition", "account"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(name, empty):
    message = _refused(launch={"backend": "slurm", name: empty})
    assert (
        message == f"launch.{name}={empty}: must not be empty; use null for the cluster's default."
    )


def test_default_is_one_process_per_gpu_or_a_single_one():
    assert LaunchConfig().tasks == 1
    assert LaunchConfig(gpus_per_node=8).tasks == 8
    assert LaunchConfig(tasks_per_node=2).tasks == 2


def test_artifacts_without_wandb_are_refused():
    message = _refused(track={"artifacts": True, "backends": ["tensorboard"]})
    assert message.startswith("track.artifacts=true: only W&B stores artifacts; add wandb to track")


def test_all_errors_are_reported_at_once():
    message = _refused(quant={"nbits": 5, "axis": 7}, adapter={"r": 0})
    assert len(message.splitlines()) == 3


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".", "..", "-x", "a b", "a\n"])
def test_a_run_name_cannot_leave_the_root(name):
    assert "run.name=" in _refused(run={"name": name})


@pytest.mark.parametrize("name", ["mine", "a.b-c_d+e", "2bit"])
def test_ordinary_run_names_are_fine(name):
    config = RunConfig()
    config.run.name = name
    config.check()
    assert config.run_name() == name


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (3, "quant.overrides[*.q_proj]=3: must be null or settings"),
        ({"nbits": 5}, "quant.overrides[*.q_proj].nbits=5: allowed are 8, 4, 3, 2, 1."),
        ({"nbits": True}, "quant.overrides[*.q_proj].nbits=True"),
        ({"bits": 4}, "quant.overrides[*.q_proj].bits: unknown; allowed are nbits, axis"),
        ({"group_size": 1}, "quant.overrides[*.q_proj].group_size=1: must be null or an integer"),
        ({"group_size": "64"}, "quant.overrides[*.q_proj].group_size=64: must be null or"),
    ],
)
def test_overrides_are_checked_like_the_keys_they_override(settings, expected):
    assert expected in _refused(quant={"overrides": {"*.q_proj": settings}})


@pytest.mark.parametrize("settings", [None, {}, {"nbits": 8, "group_size": None, "axis": 0}])
def test_sound_overrides_pass(settings):
    assert list(QuantConfig(overrides={"*.q_proj": settings}).faults()) == []


def test_bf16_adapters_with_fp16_loss_scaling_are_refused():
    config = RunConfig()
    config.adapter.dtype, config.train.precision = "bf16", "fp16"
    with pytest.raises(UserError, match=r"adapter\.dtype=bf16: .*train\.precision=fp16"):
        config.check()


def test_offloading_activations_needs_checkpointing():
    config = RunConfig()
    config.parallel.offload, config.train.checkpointing = "activations", False
    with pytest.raises(UserError, match=r"parallel\.offload=activations: .*checkpointing=true"):
        config.check()


def test_eval_needs_a_text():
    config = RunConfig(task="eval")
    config.eval.source = None
    with pytest.raises(UserError, match=r"eval\.source=null: task=eval needs a text"):
        config.check()


def test_did_you_mean_is_silent_when_nothing_is_near():
    assert did_you_mean("nbit", ["nbits", "axis"]) == " Did you mean 'nbits'?"
    assert did_you_mean("zzz", ["nbits", "axis"]) == ""
