"""Say what the next start of a run that was stopped can use, for the message of the stop."""

from pathlib import Path

from hqqtrain.config.run import RunConfig
from hqqtrain.rundir.layout import RunLayout, checkpoint_steps
from hqqtrain.rundir.schema import read_status


def resume_advice(config: RunConfig) -> str:
    """Return what was saved of the run that `config` describes, and what the same command does."""
    layout = RunLayout(Path(config.run.root).expanduser() / config.run_name())
    again = "run the same command again to"
    if config.run.resume == "never":
        again = "run the same command with run.resume=auto to"
    if config.hub.push and read_status(layout.status_json).status == "done":
        return f"the run is complete: {again} push what the hub still lacks"
    steps = checkpoint_steps(layout.checkpoints) if config.task == "finetune" else []
    if any(steps):  # a checkpoint of step 0 has nothing to resume
        return f"step {steps[-1]} is saved: {again} resume"
    if config.task == "finetune" and layout.has_quantized:
        return (
            f"no step is saved, but the quantized model is: {again} train from the first step "
            "without quantizing again"
        )
    return "nothing was saved, and the same command starts from the beginning"
