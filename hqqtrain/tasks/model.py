"""The model of a task: plan it, check that it fits, and load it."""

import logging
from functools import partial
from pathlib import Path

from hqqtrain.checkpoint.format import Checkpoint
from hqqtrain.config.groups import DataConfig
from hqqtrain.config.run import RunConfig
from hqqtrain.formats.companions import companion_files
from hqqtrain.formats.packed import check_quantized
from hqqtrain.loading.cache import cache_entry
from hqqtrain.loading.calibrated_load import Calibration
from hqqtrain.loading.model_builder import LoadedModel, build_model
from hqqtrain.loading.plan import ModelPlan, PlanSettings
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.rundir.identity import MADE_FROM, SOURCE_KEY
from hqqtrain.tasks.calibration import packed_weights_digest
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.resources import check_resources, workload_of
from hqqtrain.tasks.tokenizer import prepare_tokenizer

logger = logging.getLogger(__name__)


def plan_settings(config: RunConfig) -> PlanSettings:
    """Return the settings of `config` that `plan_model` needs."""
    quant, executes = config.quant, config.task in ("finetune", "eval", "generate")
    generates = config.task == "generate"  # texts of any length, which it checks itself
    has_data = executes or quant.calibrates or not quant.quantizes
    return PlanSettings(
        config.model,
        quant,
        config.adapter,
        2 if generates else config.train.max_seq_len,
        adapts=config.task == "finetune",
        executes=executes,
        evaluation=config.eval if executes and not generates else None,
        activation_checkpointing=(
            config.train.activation_checkpointing if config.task == "finetune" else "none"
        ),
        # The other tasks have no data: they take the tokenizer as it was saved with quantized/.
        prepare_tokenizer=partial(
            prepare_tokenizer,
            data=config.data if has_data else DataConfig(),
        ),
    )


def check_fits_run(
    run: Run, plan: ModelPlan, *, has_quantized: bool = False, has_checkpoints: bool = False
) -> None:
    """Check that the model of `plan` fits, given what the run directory already contains.

    Raises:
        UserError: It does not fit.
    """
    workload = workload_of(
        run.config,
        offloads_activations=run.runtime.offloads_activations,
        is_packed=plan.is_packed,
        has_quantized=has_quantized,
        has_checkpoints=has_checkpoints,
        calibrates=plan.calibrates,
    )
    check_resources(workload, plan.model, run.runtime)


def load_or_quantize(
    run: Run,
    plan: ModelPlan,
    checkpoint: Checkpoint | None = None,
    *,
    source_digest: str | None = None,
    calibration: Calibration | None = None,
) -> LoadedModel:
    """Load the model of `plan` without quantizing twice, and save its packed weights. Collective.

    With `quant.nbits=null` the dense source is read, and nothing is saved. Otherwise the packed
    weights come from the first of these that exists:

    1. `quantized/` of the run directory, which an earlier process of this run has saved;
    2. the source of the plan, if it is packed;
    3. the entry of `quant.cache_dir`, which another run with the same settings has saved;
    4. the dense source, which is quantized. If `quant.cache_dir` is set, the result is its entry.

    Args:
        run: The run. This function calls its recorder's `begin_run`.
        plan: The plan. Its model on the meta device becomes the loaded model.
        checkpoint: The training checkpoint that the run resumes from.
        source_digest: The digest of the plan's source if the caller knows it already.
        calibration: The calibration text, from `load_calibration`.
    """
    config, runtime, recorder = run.config, run.runtime, run.recorder
    comm, quant = runtime.comm, config.quant
    with comm.raise_on_all_ranks():
        if config.task != "eval" or quant.cache_dir:
            companion_files(plan.source.tokenizer)  # a link among them is refused early
    source_digest = source_digest or digest_source(plan.source, comm, runtime.preemption)
    digest = packed_weights_digest(source_digest, calibration)

    has_quantized = recorder.history.has_quantized(digest)
    if not has_quantized and not recorder.history.starts_over:
        _warn_if_outdated(run)
    if has_quantized:
        loaded = _load(run, plan, calibration, run.layout.quantized)
    else:
        loaded = load_source(run, plan, calibration, source_digest)
    # This creates the run directory. Bad weights have raised an error above and leave no directory.
    recorder.begin_run(loaded, checkpoint, calibration)
    # Save a copy in the run directory, so that the run does not depend on the cache.
    saves = quant.save and quant.quantizes and config.task in ("finetune", "quantize")
    if saves and not has_quantized:
        loaded.save_packed(run.layout.quantized, comm, extra_json=_made_from(digest))
    return loaded


def load_source(
    run: Run,
    plan: ModelPlan,
    calibration: Calibration | None = None,
    source_digest: str | None = None,
) -> LoadedModel:
    """Load the model of `plan` from its source or from the cache, or quantize it. Collective.

    Nothing is written, except for a new entry of `quant.cache_dir`. The arguments are those of
    `load_or_quantize`.
    """
    quant, runtime = run.config.quant, run.runtime
    if plan.is_packed or not quant.quantizes or quant.cache_dir is None:
        return _load(run, plan, calibration)
    source_digest = source_digest or digest_source(plan.source, runtime.comm, runtime.preemption)
    digest = packed_weights_digest(source_digest, calibration)
    # While this block runs, an entry that does not exist yet is locked.
    with cache_entry(
        plan, quant.cache_dir, runtime.dtype, runtime.comm, runtime.preemption, digest
    ) as entry:
        loaded = _load(run, plan, calibration, entry.folder if entry.is_complete else None)
        if not entry.is_complete:
            loaded.save_packed(entry.folder, runtime.comm, extra_json=_made_from(digest))
    return loaded


def _load(
    run: Run, plan: ModelPlan, calibration: Calibration | None, packed: Path | None = None
) -> LoadedModel:
    """Load the packed weights in the folder `packed`, or the source of the plan. Collective."""
    config, runtime = run.config, run.runtime
    # Verify the checksums of packed weights before anything is read from them.
    if packed:
        check_quantized(packed, runtime.comm)
    elif plan.is_packed:
        check_quantized(plan.source.path, runtime.comm, "Copy it again, or quantize again.")
    loads = plan.is_packed or packed is not None or not config.quant.quantizes
    with run.recorder.progress_bars.show_quantizing(plan.num_linears, loads=loads) as on_layer:
        return build_model(
            plan,
            runtime.strategy,
            config.adapter,
            config.train.seed,
            packed=packed,
            calibration=calibration,
            on_layer=on_layer,
        )


def _warn_if_outdated(run: Run) -> None:
    """Warn that `quantized/` of the run directory, if there is one, is quantized again."""
    if run.runtime.comm.is_main and run.layout.has_quantized:
        logger.warning(
            "%s: was made from other files of model.name_or_path=%s, or from another calibration "
            "text, than there are now; the model is quantized again",
            run.layout.quantized, run.config.model.name_or_path,
        )  # fmt: skip


def _made_from(digest: str) -> dict[str, dict[str, str]]:
    """Return the file name and content by which packed weights name their source."""
    return {MADE_FROM: {SOURCE_KEY: digest}}
