"""Every limit of the configuration, its message, and the names runs get."""

import pytest

from hqqtrain.common.errors import UserError, did_you_mean
from hqqtrain.config.groups import QuantConfig
from hqqtrain.config.infra import LaunchConfig
from hqqtrain.config.run import RunConfig


def _refused(**groups) -> str:
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
    ("group", "name", "value", "said"),
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
def test_a_fault_names_key_value_and_what_is_allowed(group, name, value, said):
    assert said in _refused(**{group: {name: value}})


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"nodes": 2}, "launch.nodes=2: is for slurm; add launch=slurm."),
        ({"dry_run": True}, "launch.dry_run=True: is for slurm; add launch=slurm."),
        (
            {"backend": "slurm", "time": "0:02:00"},
            "launch.grace=120: must be shorter than launch.time=0:02:00.",
        ),
        (
            {"backend": "slurm", "gpus_per_node": 8, "tasks_per_node": 1},
            "launch.tasks_per_node=1: one process for each of launch.gpus_per_node=8",
        ),
    ],
)
def test_what_slurm_would_be_told_in_vain(values, said):
    assert said in _refused(launch=values)


@pytest.mark.parametrize(
    ("group", "name"),
    [("run", "root"), ("launch", "partition"), ("launch", "account"), ("launch", "options")],
)
@pytest.mark.parametrize("broken", ["a\nb", "a\r", "\x00", "a\tb", "a\x85b", "a\u2028b"])
def test_what_stands_in_a_line_of_a_batch_file_is_one_line(group, name, broken):
    value = [f"--x={broken}"] if name == "options" else broken
    config = RunConfig(launch=LaunchConfig(backend="slurm"))
    setattr(getattr(config, group), name, value)
    with pytest.raises(UserError, match=rf"^{group}\.{name}='.*': must not hold line breaks"):
        config.check()


@pytest.mark.parametrize("name", ["partition", "account"])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_name_is_refused(name, empty):
    said = _refused(launch={"backend": "slurm", name: empty})
    assert (
        said == f"launch.{name}={empty}: is empty; name one, or use null for the cluster's default."
    )


def test_a_process_for_each_gpu_or_one():
    assert LaunchConfig().tasks == 1
    assert LaunchConfig(gpus_per_node=8).tasks == 8
    assert LaunchConfig(tasks_per_node=2).tasks == 2


def test_an_artifact_that_nobody_keeps_is_refused():
    said = _refused(track={"artifacts": True, "backends": ["tensorboard"]})
    assert said.startswith("track.artifacts=true: W&B keeps them; add wandb to track.backends")


def test_all_faults_are_told_at_once():
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
    ("settings", "said"),
    [
        (3, "quant.overrides[*.q_proj]=3: must be null or settings"),
        ({"nbits": 5}, "quant.overrides[*.q_proj].nbits=5: allowed are 8, 4, 3, 2, 1."),
        ({"nbits": True}, "quant.overrides[*.q_proj].nbits=True"),
        ({"bits": 4}, "quant.overrides[*.q_proj].bits: unknown; allowed are nbits, axis"),
        ({"group_size": 1}, "quant.overrides[*.q_proj].group_size=1: must be null or an integer"),
        ({"group_size": "64"}, "quant.overrides[*.q_proj].group_size=64: must be null or"),
    ],
)
def test_overrides_are_checked_like_the_keys_they_override(settings, said):
    assert said in _refused(quant={"overrides": {"*.q_proj": settings}})


@pytest.mark.parametrize("settings", [None, {}, {"nbits": 8, "group_size": None, "axis": 0}])
def test_sound_overrides_pass(settings):
    assert list(QuantConfig(overrides={"*.q_proj": settings}).faults()) == []


def test_bf16_adapters_have_no_scaled_gradients():
    config = RunConfig()
    config.adapter.dtype, config.train.precision = "bf16", "fp16"
    with pytest.raises(UserError, match=r"adapter\.dtype=bf16: .*train\.precision=fp16"):
        config.check()


def test_only_what_is_kept_can_be_offloaded():
    config = RunConfig()
    config.parallel.offload, config.train.activation_checkpointing = "activations", False
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
