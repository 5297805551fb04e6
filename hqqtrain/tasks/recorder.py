"""Record a run: one place for its directory, summary, metrics, console and report.

Tasks report events to the recorder on every rank, and only the main rank writes. The run directory
gets its first file once the model is loaded, so that bad weights leave nothing behind.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any

from torch import Tensor

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.checkpoint.store import CheckpointStore
from hqqtrain.common.files import atomic_write_json, make_folder
from hqqtrain.config.run import RunConfig
from hqqtrain.data.sources import dataset_name
from hqqtrain.distributed.local import global_numel
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.model_builder import LoadedModel
from hqqtrain.report.live import LiveReport
from hqqtrain.report.samples import Sample
from hqqtrain.rundir.directory import RunDirectory
from hqqtrain.rundir.schema import LAYER_ERROR_PREFIX, MODEL_NAMES, TASK_FACTS, ExportMetrics
from hqqtrain.tasks.finalize import finalize_failure, finalize_success
from hqqtrain.tasks.previous_run import PreviousRun
from hqqtrain.tasks.progress import ProgressBars
from hqqtrain.tasks.resources import translate_resource_errors, workload_of
from hqqtrain.tasks.summary import RunSummary
from hqqtrain.tracking.composite import CompositeTracker, open_trackers
from hqqtrain.tracking.console import Console, setup_logging
from hqqtrain.tracking.wandb import read_run_id, save_run_id
from hqqtrain.training.best_evaluation import BestEvaluation
from hqqtrain.training.state import StepResult, TrainState

logger = logging.getLogger(__name__)


class RunRecorder:
    """Records one run. Use it as a context manager around the task.

    On entry it locks the run directory. On exit it writes the final files of the run, or the error
    that ended it. Every rank has a recorder. Entering and leaving without an error are collectives.

    Args:
        config: The resolved configuration.
        runtime: Ranks and device of the run.
        command: The command line of this process, for the run directory.
    """

    def __init__(self, config: RunConfig, runtime: Runtime, command: list[str]) -> None:
        self.config, self.runtime, self.command = config, runtime, command
        self.is_main = runtime.comm.is_main
        setup_logging(self.is_main)
        self.directory = RunDirectory(self.config)
        self.checkpoints = CheckpointStore(
            self.directory.layout.checkpoints, config.ckpt.keep_last, config.ckpt.num_best
        )
        self.console = Console(self.is_main)
        self.progress_bars = ProgressBars(self.console, runtime)
        self.trackers = CompositeTracker([])
        self.summary = RunSummary(config, runtime)
        self.step_number = 0
        self.layer_errors: dict[str, float] = {}
        """Relative quantization error by layer."""
        self.samples: Sequence[Sample] = ()
        """Continuations of held-out text, for the report."""
        self._live_report: LiveReport | None = None
        self._history: PreviousRun | None = None
        self._has_begun = False  # whether the run directory has files of this process

    def __enter__(self) -> "RunRecorder":
        comm = self.runtime.comm
        comm.run_on_rank0(self._lock_directory)
        token = comm.run_on_rank0(self.directory.lock_token)
        with comm.raise_on_all_ranks():
            self.directory.check_shared(token)
        self._history = PreviousRun(self.directory, self.checkpoints, comm)
        return self

    @property
    def history(self) -> PreviousRun:
        """The earlier processes of the run; known once the directory is locked."""
        assert self._history is not None, "the recorder was not entered"
        return self._history

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._live_report:
                self._live_report.stop()
            if self._has_begun and error is None:
                self._finish_run()
            elif self._has_begun and error and self.is_main:
                finalize_failure(self.directory, self.trackers, error, self.summary)
        finally:
            if self.is_main:
                self.directory.__exit__(error_type, error, traceback)

    def _lock_directory(self) -> None:
        # Return None: `run_on_rank0` would broadcast the directory that `__enter__` returns.
        self.directory.__enter__()

    def _finish_run(self) -> None:
        """Write the final files on the main rank; record an error that occurs meanwhile."""
        try:
            with translate_resource_errors(workload_of(self.config), self.runtime.strategy):
                self.runtime.comm.run_on_rank0(
                    lambda: finalize_success(
                        self.directory, self.trackers, self.console, self.summary, self.samples
                    )
                )
        except Exception as error:
            if self.is_main:
                finalize_failure(self.directory, self.trackers, error, self.summary)
            raise

    def begin_run(
        self,
        loaded: LoadedModel,
        checkpoint: Checkpoint | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        """Write the first files of the run directory, now that the model is loaded. Collective.

        Args:
            loaded: The loaded model.
            checkpoint: The checkpoint that the run resumes from. It contains the state of the
                recorder, which is restored.
            calibration: The text that the model was calibrated with, if any.
        """
        self.summary.add_quantization(loaded, calibration)
        self.layer_errors = loaded.layer_errors
        if checkpoint:
            self.load_state_dict(checkpoint.state["record"])
            self.step_number = checkpoint.step
        self.runtime.comm.run_on_rank0(lambda: self._write_first_files(loaded, checkpoint))
        self._has_begun = True
        if not checkpoint:
            errors = {
                f"{LAYER_ERROR_PREFIX}{name}": error for name, error in self.layer_errors.items()
            }
            self.trackers.log(errors, 0)

    def begin_without_model(self) -> None:
        """Write the first files of the run directory for a task that loads no model. Collective."""
        self.runtime.comm.run_on_rank0(lambda: self.directory.begin(self.command))
        self._has_begun = True

    def _write_first_files(self, loaded: LoadedModel, checkpoint: Checkpoint | None) -> None:
        for stats in loaded.load_stats:
            logger.info("%s", stats)
        self.directory.begin(self.command)
        self.directory.write_loading([stats.to_json() for stats in loaded.load_stats])
        # A copied run directory may lack W&B's files; the checkpoint has the id as well.
        wandb_run_id = checkpoint and checkpoint.state["record"]["wandb_run_id"]
        if wandb_run_id and not read_run_id(self.directory.path):
            save_run_id(self.directory.path, wandb_run_id)
        # W&B and TensorBoard show trainings; other tasks only write metrics.jsonl.
        trains = self.config.task == "finetune"
        track = self.config.track if trains else replace(self.config.track, backends=[])
        settings = asdict(self.config)
        settings["eval"] |= self.config.eval_protocol()
        self.trackers = open_trackers(track, self.directory.path, settings, self.step_number)
        if self.config.task == "export":  # it has no figure that changes
            return
        self._live_report = LiveReport(self.directory.path, lambda: self.summary.content.to_json())
        self._live_report.start()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the recorder that a checkpoint contains, as JSON values."""
        return {
            "summary": self.summary.state_dict(),
            "layer_errors": self.layer_errors,
            "wandb_run_id": read_run_id(self.directory.path),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state_dict`, before the first files are written."""
        self.summary.load_state_dict(state["summary"])
        self.layer_errors = state["layer_errors"]

    def has_evaluated(self, model_key: str) -> bool:
        """Whether this process or an earlier one has evaluated `quantized` or `final`."""
        return model_key in self.summary.content.measured_models()

    def save_nonfinite_batch(self, step: StepResult, details: dict[str, Any]) -> None:
        """Save a global batch whose loss or gradient is not finite to `nonfinite/`.

        Args:
            step: The step, with its loss and gradient norm.
            details: JSON values: the layer of the first non-finite value, and the batch's text.
        """
        if not self.is_main:
            return
        # Loss and norm are text, because JSON has no NaN and no infinity.
        batch: dict[str, Any] = {"batch": step.batch_index, "step": step.number}
        batch |= {"loss": str(step.loss), "grad_norm": str(step.grad_norm), **details}
        folder = self.directory.layout.nonfinite
        try:
            make_folder(folder)
            atomic_write_json(folder / f"batch-{step.batch_index:08}.json", batch)
        except OSError as error:
            logger.error("%s: batch %d was not saved: %s", folder, step.batch_index, error)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of an optimizer step."""
        self.step_number = step
        self.trackers.log(metrics, step)
        self.progress_bars.advance_training(metrics)

    def record_training(self, state: TrainState, parameters: Sequence[Tensor]) -> None:
        """Add the training to the summary. Collective.

        Args:
            state: Steps, tokens, time and loss of the training.
            parameters: The trained parameters, sharded or not.
        """
        self.summary.add_training(state, sum(map(global_numel, parameters)))

    def record_export(self, metrics: ExportMetrics) -> None:
        """Add export/ to the summary, now that it is written."""
        if self.is_main:
            self.summary.add_export(metrics)

    def record_reference_bytes(self, bytes_read: int) -> None:
        """Add the bytes read for the full-precision reference model to the summary."""
        self.summary.add_reference_bytes(bytes_read)

    def record_best(
        self, best: BestEvaluation, *, adapter_step: int, stopped_early: str | None
    ) -> None:
        """Add the best evaluation during training to the summary, and log it.

        Args:
            best: The best evaluation.
            adapter_step: The step of the adapter that is the result.
            stopped_early: Why the training has stopped before its last step; None: it has not.
        """
        if self.config.eval.every is None or best.step is None:
            return
        folder = self.checkpoints.folder(best.step)
        checkpoint = f"{folder.parent.name}/{folder.name}" if folder.exists() else None
        self.summary.add_best(best, checkpoint, adapter_step, stopped_early)
        logger.info(
            "lowest eval/loss: %.4f after step %d%s", best.loss, best.step,
            f" ({checkpoint})" if checkpoint else "; ckpt.keep_best=1 keeps its checkpoint",
        )  # fmt: skip

    def record_evaluation(self, model_key: str, result: EvalResult, *, log: bool = True) -> None:
        """Add the evaluation of `quantized` or `final` to the summary; `log` it as well."""
        dataset = dataset_name(self.config.eval, self.config.data)
        self.summary.add_evaluation(dataset, model_key, result)
        if log:
            self.log_evaluation(result, model_key)

    def record_harness(self, model_key: str, figures: dict[str, dict[str, float]]) -> None:
        """Add figures of `eval.harness` to the summary, and log them as `harness/<task>/...`."""
        self.summary.add_harness(model_key, figures)
        metrics = {
            f"harness/{task}/{name}": value
            for task, values in figures.items()
            for name, value in values.items()
            if name not in TASK_FACTS
        }
        self.trackers.log(metrics, self.step_number)

    def log_evaluation(self, result: EvalResult, model_key: str = "final") -> None:
        """Log an evaluation of `quantized` or `final` as a point of the curves `eval/...`."""
        metrics = {"eval/loss": result.loss, "eval/perplexity": result.perplexity}
        if result.kl is not None:
            metrics["eval/kl"] = result.kl
        if result.top1_agreement is not None:
            metrics["eval/top1_agreement"] = result.top1_agreement
        self.trackers.log(metrics, self.step_number)
        distance = "" if result.kl is None else f", KL {result.kl:.4f}"
        if result.top1_agreement is not None:
            distance += f", top-1 agreement {result.top1_agreement:.1%}"
        # task=eval has no steps, but may measure two models.
        trains, evaluation = self.config.task == "finetune", self.config.eval
        protocol = f" (eval.protocol={evaluation.protocol})" if evaluation.joins_texts else ""
        logger.info(
            "%s: held-out loss %.4f, perplexity %.4g%s%s",
            f"step {self.step_number}" if trains else f"{MODEL_NAMES[model_key]} model",
            result.loss, result.perplexity, protocol, distance,
        )  # fmt: skip
