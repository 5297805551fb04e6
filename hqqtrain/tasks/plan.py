"""The task `plan`: predict memory, speed and disk of a training, before anything is loaded.

The model is built on the meta device from its config.json, so a plan takes seconds for a model of
any size. The GPU need not be there.
"""

import logging
from dataclasses import replace

from hqqtrain.tasks.context import Run
from hqqtrain.tasks.plan_changes import try_changes
from hqqtrain.tasks.plan_text import render_plan
from hqqtrain.tasks.prediction import Predictor


def show_plan(run: Run) -> None:
    """Print what the training of the same settings needs, and what to change if it does not fit.

    Raises:
        UserError: The settings of the training have a fault.
    """
    logging.getLogger("hqqtrain").setLevel(logging.WARNING)  # plans that are tried log, too
    predictor = Predictor(run.runtime)
    plan = predictor.predict(replace(run.config, task="finetune"))
    changes = [] if plan.fits else try_changes(predictor, plan)
    run.recorder.console.print_text(render_plan(plan, changes))
