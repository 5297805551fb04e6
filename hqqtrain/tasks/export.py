"""task=export: write a model for other programs, and check what was written."""

import logging
from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.data.layout import BatchLayout
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.formats.base import ModelExport, WrittenModel
from hqqtrain.formats.exported_model import exported_model
from hqqtrain.formats.quantized_settings import QuantizedSettings
from hqqtrain.formats.registry import FORMATS, check_format
from hqqtrain.loading.model_builder import LoadedModel, RunnableModel, WithoutAdapter
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.models.rope import max_batched_length
from hqqtrain.quant.spec import DTYPES
from hqqtrain.rundir.schema import ExportMetrics
from hqqtrain.tasks.calibration import load_calibration
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.datasets import load_held_out_data
from hqqtrain.tasks.model import check_fits_run, load_or_quantize, plan_settings

logger = logging.getLogger(__name__)


def export(run: Run) -> None:
    """Write the model in `export.format`."""
    settings, comm = run.config.export, run.runtime.comm
    export_format = FORMATS[settings.format].configured(settings)
    with comm.raise_on_all_ranks():
        plan = plan_model(plan_settings(run.config), run.runtime)
        adapter = plan.initial_adapter
        quantized = QuantizedSettings.from_model(plan.model)
        folder = adapter.folder if adapter else None
        check_format(settings.format, quantized, plan.hf_config, settings)
        form = export_format.adapter_form(settings.adapter, folder, quantized)
        check_fits_run(run, plan)
    loaded = load_or_quantize(run, plan, calibration=load_calibration(run, plan))
    model = ModelExport(
        model=loaded.model,
        settings=loaded.settings,
        hf_config=plan.hf_config,
        tokenizer=plan.source.tokenizer,
        source_dtype=plan.source_dtype,
        adapter=adapter.adapter if adapter else None,
        adapter_folder=folder,
        adapter_form=form,
        dtype=DTYPES.get(settings.dtype),
        compute_dtype=run.runtime.dtype,
        device=run.runtime.device,
        comm=comm,
        name=_model_name(run.config.model.name_or_path),
    )
    check = _ExportCheck(run, plan, loaded, model)
    export_format.write(model, run.layout.export, check)
    if comm.is_main:
        run.recorder.record_export(_metrics(run.layout.export, model, check))


class _ExportCheck:
    """Checks a written model against `export.max_error` and `export.max_kl`.

    Attributes:
        kl: The KL divergence of the export to the quantized model; None: it was not measured.
    """

    written: WrittenModel

    def __init__(self, run: Run, plan: ModelPlan, loaded: LoadedModel, export: ModelExport) -> None:
        self._run, self._plan, self._loaded, self._export = run, plan, loaded, export
        self.kl: float | None = None

    def __call__(self, written: WrittenModel) -> None:
        """Check `written`. Collective.

        Raises:
            UserError: It is further from the quantized model than the configuration allows.
        """
        self.written, settings = written, self._run.config.export
        written.comparison.check(settings.max_error)
        if settings.max_kl is None or written.comparison.max_error == 0:
            return
        reason, strategy = "", self._run.runtime.strategy
        if self._run.config.eval.source is None:
            reason = "eval.source=null"
        elif strategy.shards_parameters:
            reason = f"parallel.strategy={strategy.name} shards the model"
        elif strategy.offloads_parameters or strategy.offloads_meta:
            reason = "weights stay in host memory (parallel.offload, quant.offload_meta)"
        if reason:
            if self._run.runtime.comm.is_main:
                logger.warning("export.max_kl: the KL divergence is not measured: %s", reason)
            return
        self.kl = self._measure_kl(written)
        if not self.kl <= settings.max_kl:
            raise UserError(
                f"export.max_kl={settings.max_kl:g}: the export has a KL divergence of "
                f"{self.kl:.3g} nats per token to the quantized model on "
                f"eval.source={self._run.config.eval.source}. Use a format that keeps the weights "
                "(packed, hqq, dense), or a larger export.max_kl or null."
            )

    def _measure_kl(self, written: WrittenModel) -> float:
        """Return KL(quantized model || export) in nats per token. Collective."""
        run, export = self._run, self._export
        config, runtime = run.config, run.runtime
        model = self._loaded.model.eval()
        held_out = load_held_out_data(run, export.tokenizer, vocabulary_size(self._plan.model))
        assert held_out is not None
        merged = export.merged.modules if export.merged else ()
        exported = exported_model(model, written.read_layer, merged)
        ours, theirs = (
            RunnableModel(self._plan, each, self._loaded.settings) for each in (model, exported)
        )
        without = export.adapter is not None and export.adapter_form == "none"
        evaluator = Evaluator(
            held_out,
            runtime.comm,
            runtime.preemption,
            config.eval.batch_size(config.train.micro_batch_size, config.train.max_seq_len),
            WithoutAdapter(ours) if without else model,
            runtime.autocast,
            # The task has not probed whether the model keeps packed texts apart.
            BatchLayout(packs=False, max_batched_length=max_batched_length(model)),
            config.eval.joins_texts,
            run.recorder.progress_bars.show_evaluating,
        )
        result = evaluator.evaluate(WithoutAdapter(theirs) if without else exported)
        assert result.kl is not None
        return result.kl


def _model_name(name_or_path: str) -> str:
    """Return the last part of the name of a model, or the name of the run that has made it."""
    path = Path(name_or_path).absolute()
    return path.parent.name if path.name in ("quantized", "adapter", "export") else path.name


def _metrics(folder: Path, export: ModelExport, check: _ExportCheck) -> ExportMetrics:
    """Return the figures of what was written to `folder`."""
    files = (file for pattern in ("*.safetensors", "*.gguf") for file in folder.glob(pattern))
    form, written, comparison = export.adapter_form, check.written, check.written.comparison
    bits = comparison.bits_per_weight
    if bits is None and written.dtype:  # nothing is quantized
        bits = 8.0 * written.dtype.itemsize
    return ExportMetrics(
        format=written.format,
        dtype=str(written.dtype).removeprefix("torch.") if written.dtype else None,
        bytes=sum(file.stat().st_size for file in files),
        adapter=form == "merge",
        adapter_form=None if form == "none" else form,
        bits_per_weight=bits,
        **comparison.counts,
        max_error=comparison.max_error,
        relative_error=comparison.relative_error,
        kl=check.kl,
    )
