"""Measure on a GPU what the README's table predicts: the longest sequence that fits.

    python scripts/measure_memory.py kernels/bench/results/memory.csv

Each model has all of its layers, with random weights that are generated on the GPU, quantized and
loaded as in a run. Then PyTorch's allocator gets the memory of a smaller GPU, less the memory that
CUDA and the kernels take outside of it, and the sequences grow until the run is out of memory. A
length that fits is not tried again with more memory. On a CPU, every length fits.
"""

import argparse
import csv
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from memory_table import GPUS_GB, LENGTHS, NBITS, memory_run, model_configs
from transformers import PretrainedConfig

from hqqtrain.data.layout import Batch, collate_batch
from hqqtrain.data.sequences import TokenSequences, plain_text_targets
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.distributed.runtime import Runtime, peak_memory_bytes
from hqqtrain.distributed.strategies.check import RuntimeSettings
from hqqtrain.evaluation.perplexity import evaluate_perplexity
from hqqtrain.loading.model_builder import build_model, wrap_for_execution
from hqqtrain.loading.plan import plan_model
from hqqtrain.models.causal_lm import vocabulary_size
from hqqtrain.tasks.model import plan_settings
from hqqtrain.training.activation_checkpointing import apply_activation_checkpointing
from hqqtrain.training.engine_builder import build_engine
from hqqtrain.training.losses.model_loss import ModelLoss
from hqqtrain.training.losses.registry import LOSSES
from hqqtrain.training.optimizer import trainable_parameters

WARM_UP_TOKENS = 512
"""Tokens of the first step, and of the micro-batch whose gradients are there in every other one."""


@dataclass(frozen=True)
class Measurement:
    """One attempt, a line of the file.

    Attributes:
        model: The name of the model.
        nbits: `quant.nbits`.
        gpu_gb: GB (1e9 bytes) of the GPU whose memory the allocator got.
        tokens: Length of the sequence; 0: quantizing and loading.
        fits: "fits" or "out of memory".
        peak_gib: Peak of the allocated memory in GiB, also of an attempt that failed.
        outside_gib: Memory outside of PyTorch's allocator in GiB.
        seconds: Seconds of the attempt.
        gpu: The GPU that measured.
        torch: Version of PyTorch.
        transformers: Version of transformers.
        date: The day.
    """

    model: str
    nbits: int
    gpu_gb: int
    tokens: int
    fits: str
    peak_gib: float
    outside_gib: float
    seconds: float
    gpu: str
    torch: str = torch.__version__
    transformers: str = transformers.__version__
    date: str = date.today().isoformat()


class TrainingStep:
    """A loaded model that can be evaluated and trained on one sequence of any length.

    Args:
        config: The configuration of the model.
        nbits: `quant.nbits`.
        lengths: All lengths that will be tried.
    """

    def __init__(self, config: PretrainedConfig, nbits: int, lengths: Sequence[int]) -> None:
        run = memory_run(nbits)
        run.train.max_seq_len = max(lengths)
        settings = RuntimeSettings(
            run.parallel, run.quant, run.adapter, run.train, run.optim, trains=True
        )
        self.runtime = runtime = Runtime.start(settings, PreemptionHandler(run.run))
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            run.model.name_or_path, run.model.source = folder, "synthetic"
            plan = plan_model(plan_settings(run), runtime)
            loaded = build_model(plan, runtime.strategy, run.adapter, run.train.seed)
        self._vocab_size = vocabulary_size(plan.model)
        self._model = model = wrap_for_execution(loaded, runtime.strategy).model
        apply_activation_checkpointing(model, offload=False)
        self._engine = build_engine(
            model, trainable_parameters(model), runtime, run.optim, run.train.max_grad_norm
        )
        self._loss = ModelLoss(
            model, LOSSES[run.train.objective](), runtime.comm,
            max_tokens=max(lengths), autocast=runtime.autocast,
        )  # fmt: skip
        self.learning_rate = run.optim.lr

    def __call__(self, tokens: int) -> None:
        """Evaluate a text of `tokens` tokens, then train on as many, in three packed texts.

        The step has two micro-batches, so the second finds gradients in memory.
        """
        comm, engine = self.runtime.comm, self._engine
        with self.runtime.autocast():
            evaluate_perplexity(self._model, self._sequence(tokens, 1), comm, batch_size=1)
        self._model.train()
        for length in (min(tokens, WARM_UP_TOKENS), tokens):
            with engine.accumulating(last=length == tokens):
                loss, count = self._loss(self._batch(length))
                engine.backward(loss / count)
        engine.grad_norm(self.learning_rate)
        engine.step(self.learning_rate)

    def reset(self) -> None:
        """Drop the gradients of a step that ran out of memory."""
        self._engine.skip_step()

    def _batch(self, tokens: int) -> Batch:
        batch = collate_batch(self._sequence(tokens, 3))
        return {name: tensor.to(self.runtime.device) for name, tensor in batch.items()}

    def _sequence(self, tokens: int, texts: int) -> TokenSequences:
        """Return one sequence of random tokens, in `texts` texts of equal length."""
        stream = np.random.default_rng(0).integers(self._vocab_size, size=tokens, dtype=np.int32)
        starts = np.arange(texts) * (tokens // texts)
        return TokenSequences(
            stream, plain_text_targets(stream, starts), starts, np.array([0]), np.array([tokens])
        )


def try_lengths(
    attempt: Callable[[int, int], bool], gpus: Sequence[int], lengths: Sequence[int]
) -> dict[int, int | None]:
    """Return GB of a GPU -> the longest length for which `attempt` succeeds, or None.

    Args:
        attempt: Whether a length fits, called with GB and length.
        gpus: GB of the GPUs, ascending.
        lengths: Lengths, ascending.
    """
    longest: dict[int, int | None] = {}
    fitting = 0
    for gpu in gpus:
        while fitting < len(lengths) and attempt(gpu, lengths[fitting]):
            fitting += 1
        longest[gpu] = lengths[fitting - 1] if fitting else None
    return longest


def measure(
    name: str, config: PretrainedConfig, nbits: int, gpus: Sequence[int], lengths: Sequence[int],
    on_attempt: Callable[[Measurement], object],
) -> None:  # fmt: skip
    """Measure one model at one number of bits; report every attempt, that of loading first."""
    started = time.perf_counter()
    step = TrainingStep(config, nbits, lengths)
    device = step.runtime.device
    loading_bytes, loading_seconds = peak_memory_bytes(device), time.perf_counter() - started
    step(min(WARM_UP_TOKENS, *lengths))  # compiles kernels and creates the optimizer's state
    outside = outside_bytes(device)

    def record(gpu: int, tokens: int, fits: bool, peak: int, seconds: float) -> bool:
        on_attempt(Measurement(
            name, nbits, gpu, tokens, "fits" if fits else "out of memory",
            round(peak / 2**30, 2), round(outside / 2**30, 2), round(seconds, 2),
            step.runtime.device_name,
        ))  # fmt: skip
        return fits

    def attempt(gpu: int, tokens: int) -> bool:
        started = time.perf_counter()
        free_memory(device)
        limit_memory(device, gpu * 10**9 - outside)
        fits = runs(step, tokens)
        limit_memory(device, None)
        peak = peak_memory_bytes(device)
        return record(gpu, tokens, fits, peak, time.perf_counter() - started)

    loadable = [
        gpu for gpu in gpus
        if record(gpu, 0, device.type != "cuda" or loading_bytes + outside <= gpu * 10**9,
                  loading_bytes, loading_seconds)
    ]  # fmt: skip
    try_lengths(attempt, loadable, lengths)


def runs(step: TrainingStep, tokens: int) -> bool:
    """Whether `step` runs with `tokens` tokens without running out of memory."""
    try:
        step(tokens)
    except torch.OutOfMemoryError:
        step.reset()
        return False
    return True


def free_memory(device: torch.device) -> None:
    """Return what is not in use to the GPU, and forget the peak."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def limit_memory(device: torch.device, size: int | None) -> None:
    """Let PyTorch's allocator take at most `size` bytes of the GPU; None: all of it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        fraction = 1.0 if size is None else max(0.0, size / total)
        torch.cuda.set_per_process_memory_fraction(fraction)  # of the current device


def outside_bytes(device: torch.device) -> int:
    """Bytes of the GPU that are in use outside of PyTorch's allocator, such as CUDA's own."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)


def main() -> None:
    """Measure the models, print every attempt, and append it to the file."""
    names = list(model_configs())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="CSV file that gets the measurements")
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--nbits", nargs="+", type=int, default=NBITS)
    parser.add_argument("--gpus", nargs="+", type=int, default=GPUS_GB, help="GB, ascending")
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="ascending")
    arguments = parser.parse_args()
    started = time.perf_counter()
    arguments.file.parent.mkdir(parents=True, exist_ok=True)
    with arguments.file.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        if not file.tell():
            writer.writeheader()

        def on_attempt(row: Measurement) -> None:
            writer.writerow(asdict(row))
            file.flush()
            print(
                f"{time.perf_counter() - started:.0f} s: {row.model}, {row.nbits} bits, "
                f"{row.gpu_gb} GB, {f'{row.tokens} tokens' if row.tokens else 'loading'}: "
                f"{row.fits}, peak {row.peak_gib} GiB, {row.seconds} s",
                flush=True,
            )

        for name in arguments.models:
            for nbits in arguments.nbits:
                config = model_configs()[name]
                measure(name, config, nbits, arguments.gpus, arguments.lengths, on_attempt)
                free_memory(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
