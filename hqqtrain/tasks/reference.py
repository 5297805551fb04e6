"""The full-precision model to which a run compares its own, in one of the ways of `eval.reference`.

It is loaded as a whole (`resident`), or runs through the held-out set one decoder layer at a time
(`streamed`). With `cached`, the result of the latter is on disk for other runs.
"""

import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hqqtrain.common.cache_entry import default_cache_root
from hqqtrain.common.text import format_bytes
from hqqtrain.data.layout import Batch, BatchLayout
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.evaluation.perplexity import batches_of_this_rank
from hqqtrain.evaluation.reference import ResidentReference
from hqqtrain.evaluation.reference_cache import ReferenceCache
from hqqtrain.evaluation.streamed_reference import (
    HiddenStates,
    StreamedReference,
    inputs_by_digest,
    stream_hidden_states,
)
from hqqtrain.loading.model_builder import RunnableModel, WithoutAdapter, build_reference
from hqqtrain.loading.reference_memory import shared_tensors
from hqqtrain.loading.source_digest import digest_source
from hqqtrain.loading.streamed_layers import StreamedLayers
from hqqtrain.models.build import build_meta
from hqqtrain.models.causal_lm import MAX_KEPT_BYTES, kept_hidden_bytes
from hqqtrain.models.families.structure import output_head
from hqqtrain.models.weights.synthetic import open_weight_source
from hqqtrain.tasks.context import Run

logger = logging.getLogger(__name__)


def open_reference(
    run: Run,
    runnable: RunnableModel,
    held_out: TokenSequences,
    layout: BatchLayout,
    batch_size: int,
    source_digest: str | None,
) -> nn.Module | None:
    """Return the full-precision model, or None if the run compares with none. Collective.

    Args:
        run: The run.
        runnable: The model that is compared.
        held_out: The tokenized held-out set.
        layout: Which texts may share a batch.
        batch_size: Sequences per batch and rank.
        source_digest: The digest of the source, if the caller knows it.
    """
    how = run.config.eval.reference
    if how == "off":
        return None
    if runnable.plan.is_packed:
        if how != "resident" and run.runtime.comm.is_main:
            logger.warning(
                "eval.reference=%s: %s has packed weights only, so no full-precision model is "
                "measured; to compare with it, name the original model, with the settings of the "
                "run and adapter.init_from", how, runnable.plan.source.name,
            )  # fmt: skip
        return None
    # A base that is not quantized is in memory as a whole, whatever `how` says.
    if how == "resident" or not run.config.quant.quantizes:
        return _open_resident(run, runnable, held_out)
    batches = batches_of_this_rank(
        held_out,
        batch_size,
        run.runtime.comm,
        layout,
        counts_first=run.config.eval.joins_texts,
    )
    return _open_streamed(run, runnable, (batch for batch, *_ in batches), source_digest)


def _open_resident(
    run: Run,
    runnable: RunnableModel,
    held_out: TokenSequences,
) -> nn.Module:
    """Return the full-precision model, which keeps its outputs if it is not sharded. Collective.

    If the compared model is not quantized, it is the model itself without its adapter. If no
    outputs are kept, the log says why.
    """
    model, runtime = runnable.model, run.runtime
    reference: nn.Module = WithoutAdapter(runnable)
    bytes_read = 0
    if run.config.quant.quantizes:
        reference, bytes_read = build_reference(
            runnable.plan, runtime.strategy, runtime.dtype, runtime.preemption
        )
    run.recorder.record_reference_bytes(bytes_read)
    tokens = int((held_out.end - held_out.begin).sum())
    # The head of the evaluated model serves as that of the reference, if it is not quantized.
    size = kept_hidden_bytes(model, math.ceil(tokens / runtime.comm.size), runtime.dtype)
    reason = ""
    if runtime.strategy.shards_parameters:
        reason = f"parallel.strategy={runtime.strategy.name} shards it"
    elif not size:
        reason = "its outputs are kept only if the head is neither quantized nor trained"
    elif size > MAX_KEPT_BYTES:
        reason = f"its outputs for {tokens} tokens take more than {MAX_KEPT_BYTES >> 20} MiB"
    if reason:
        if runtime.comm.is_main:
            logger.info(
                "eval.reference=resident: the full-precision model stays in memory and is "
                "called at every evaluation, because %s", reason,
            )  # fmt: skip
        return reference
    return ResidentReference(reference, output_head(model))


def _open_streamed(
    run: Run, runnable: RunnableModel, batches: Iterable[Batch], source_digest: str | None
) -> nn.Module:
    """Run the full-precision model layer by layer, or read what an earlier run has kept of it."""
    plan, runtime, evaluation = runnable.plan, run.runtime, run.config.eval
    comm, preemption = runtime.comm, runtime.preemption
    model = build_meta(plan.hf_config, runtime.dtype)
    reader = open_weight_source(plan.source, model, comm.device)
    shards = runtime.strategy.shards_parameters or runtime.strategy.offloads_parameters
    shared = {} if shards else shared_tensors(runnable.model)
    streamed = StreamedLayers(model, reader, comm, shared)
    streamed.load_outside()
    inputs = inputs_by_digest(streamed.model, batches)

    def compute() -> HiddenStates:
        start, count = time.perf_counter(), len(streamed.layerwise.layers)
        with run.recorder.progress_bars.show_streaming(count) as on_layer, runtime.autocast():
            states = stream_hidden_states(streamed, inputs, comm, on_layer)
        if comm.is_main:
            logger.info(
                "eval.reference=%s: %d decoder layers of the full-precision model in %.1f s; what "
                "is kept of it takes %s of each rank", evaluation.reference, count,
                time.perf_counter() - start,
                format_bytes(sum(hidden.nbytes for hidden in states.values())),
            )  # fmt: skip
        return states

    if evaluation.reference == "streamed":
        states = compute()
    else:
        digest = source_digest or digest_source(plan.source, comm, preemption)
        folder, run_root = evaluation.cache_dir, Path(run.config.run.root).expanduser()
        default = comm.run_on_rank0(lambda: default_cache_root("reference", run_root))
        root = Path(folder).expanduser() if folder else default
        cache = ReferenceCache(root, f"eval.cache_dir={folder or root}", comm, preemption)
        made_from = _made_from(run, runnable, digest)
        states = cache.find_or_compute(
            plan.source.name, made_from, list(inputs), streamed.layerwise, compute
        )
    run.recorder.record_reference_bytes(int(comm.all_reduce_sum([reader.bytes_read])[0]))
    return StreamedReference(streamed, states)


def _made_from(run: Run, runnable: RunnableModel, source_digest: str) -> dict[str, Any]:
    """Return all that decides the hidden states of a batch, as JSON values."""
    source, runtime = runnable.plan.source, run.runtime
    on_gpu = runtime.device.type == "cuda"
    return {
        "model": [source_digest, source.kind, source.name if source.kind == "synthetic" else ""],
        "rows": max(source.trained_token_ids, default=0),
        "precision": [str(runtime.dtype), runtime.precision],
        "software": [torch.__version__, transformers.__version__],
        "device": runtime.device_name if on_gpu else torch.backends.cpu.get_cpu_capability(),
    }
