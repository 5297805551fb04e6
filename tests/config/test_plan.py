"""Values of the group `plan`."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.plan import PlanConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.config.unused import unused_settings


@pytest.mark.parametrize("gpu", ["auto", "24GB", "80 GiB", "H100", "rtx 4090"])
def test_names_and_sizes_of_gpus(gpu: str):
    assert list(PlanConfig(gpu=gpu).errors()) == []


def test_an_unknown_gpu_is_refused_with_the_nearest():
    (message,) = PlanConfig(gpu="H10").errors()
    assert message.startswith("plan.gpu=H10: is no known GPU; give its memory, such as 24GB")
    assert "Did you mean 'H100'?" in message
    with pytest.raises(UserError, match=r"plan\.gpus=0: must be at least 1"):
        RunConfig(plan=PlanConfig(gpus=0)).check()


def test_a_plan_does_not_define_a_result_and_only_its_task_uses_it():
    config = RunConfig(task="plan", plan=PlanConfig(gpu="H100"))
    assert not config.has_run_directory
    assert RunConfig(plan=config.plan).identity() == RunConfig().identity()
    assert list(unused_settings(config, ["plan.gpu", "optim.lr"])) == []
    assert list(unused_settings(config, ["generate.prompt"]))
    assert list(unused_settings(RunConfig(plan=config.plan), ["plan.gpu"]))
