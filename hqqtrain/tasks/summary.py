"""The final figures of a run: `summary.json` (schema 1) and the table on the console."""

from collections import Counter
from copy import deepcopy
from dataclasses import asdict, astuple, replace
from typing import Any

from hqqtrain.ckpt import versions
from hqqtrain.config.secrets import masked
from hqqtrain.models import base_tensors, is_packed
from hqqtrain.nn import HQQLinear
from hqqtrain.quant import stored_bits
from hqqtrain.tasks.plan import Plan
from hqqtrain.tasks.prepare import Built
from hqqtrain.track import ResultRow
from hqqtrain.train.evaluation import Measured
from hqqtrain.train.progress import Trained
from hqqtrain.train.session import Session

GIB = 2**30
_ROWS = {"full_precision": "full precision", "quantized": "quantized", "final": "trained"}


class Summary:
    """The summary, filled part by part during the run; parts that a task skips are absent."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.parts: dict[str, Any] = {"schema": 1, "run": self._run()}
        self._rows = {part: ResultRow(name) for part, name in _ROWS.items()}

    def quantized(self, plan: Plan, built: Built) -> None:
        """Add the facts of the loaded model. Collective.

        The relative error is absent if the weights were packed already.
        """
        layers = [m for m in built.model.modules() if isinstance(m, HQQLinear)]
        weights = sum(m.out_features * m.in_features for m in layers)
        packed = sum(stored_bits(m.layout, m.spec.meta_dtype) for m in layers) // 8
        facts = self._settings(built) | {
            "bits_per_weight": 8 * packed / weights,
            "seconds": built.seconds,
            "weights": weights,
            "source_bytes": plan.reader.total_bytes,
            "bytes_read": built.bytes_read,
            "peak_memory_gib": self.session.peak_memory_gib(),
            "fingerprint": built.settings.fingerprint,
        }
        if built.relative_error is not None:
            facts["relative_error"] = built.relative_error
        self.parts["quantize"] = facts
        self._sizes(plan, built, packed, facts["bits_per_weight"])

    def evaluated(self, dataset: str, part: str, measured: Measured) -> None:
        """Add an evaluation, and that of the full-precision reference model if there is one.

        Args:
            dataset: Name of the held-out set.
            part: `quantized` or `final`.
            measured: The figures.
        """
        evaluation = self.parts.setdefault("eval", {})
        evaluation |= {"dataset": masked(dataset), "tokens": measured.tokens}
        if measured.reference_perplexity is not None:
            evaluation["full_precision"] = {"perplexity": measured.reference_perplexity}
            self._row("full_precision", perplexity=measured.reference_perplexity, kl=0.0)
        evaluation[part] = {"perplexity": measured.perplexity}
        if measured.kl is not None:
            evaluation[part]["kl"] = measured.kl
        self._row(part, perplexity=measured.perplexity, kl=measured.kl)

    def reference_read(self, bytes_read: int) -> None:
        """Add the weight bytes read for the full-precision reference model, counted apart."""
        self.parts.setdefault("eval", {})["bytes_read"] = bytes_read

    def trained(self, done: Trained, trainable: int) -> None:
        """Add the figures of the training. Collective.

        Args:
            done: Steps, tokens, seconds and loss.
            trainable: Number of trainable parameters over all ranks.
        """
        self.parts["train"] = {
            "steps": done.steps,
            "tokens": done.tokens,
            "seconds": done.seconds,
            "tokens_per_second": done.tokens / done.seconds if done.seconds else 0.0,
            "peak_memory_gib": self.session.peak_memory_gib(),
            "trainable_parameters": trainable,
            "loss": done.loss,
        }
        base = self._rows["quantized"]
        self._row(
            "final", seconds=done.seconds, bits_per_weight=base.bits_per_weight,
            gib=(base.gib or 0) + 4 * trainable / GIB,
        )  # fmt: skip

    def state(self) -> dict[str, Any]:
        """Return the parts and the table rows so far, as JSON, for `restore`."""
        return {
            "parts": deepcopy(self.parts),
            "rows": {k: asdict(row) for k, row in self._rows.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the quantization, the evaluations and the table from a checkpoint."""
        for part in ("quantize", "eval"):
            if part in state["parts"]:
                self.parts[part] = state["parts"][part]
        self._rows = {name: ResultRow(**row) for name, row in state["rows"].items()}

    def rows(self) -> list[ResultRow]:
        """Return the rows of the final table that have a figure."""
        return [row for row in self._rows.values() if any(v is not None for v in astuple(row)[1:])]

    def _run(self) -> dict[str, Any]:
        session, config = self.session, self.session.config
        return {
            "name": config.run_name(),
            "recipe": config.recipe or "",
            "task": config.task,
            "strategy": session.strategy,
            "world_size": session.processes.size,
            "device": session.device_name,
            "versions": versions(),
        }

    def _settings(self, built: Built) -> dict[str, Any]:
        """Return the quantization settings that most layers have."""
        keys = ("nbits", "group_size", "axis", "solver")
        by_layer = [tuple(getattr(m, k) for k in keys) for m in built.settings.modules.values()]
        return dict(zip(keys, Counter(by_layer).most_common(1)[0][0], strict=True))

    def _sizes(self, plan: Plan, built: Built, packed: int, bits: float) -> None:
        """Add bits per quantized weight and GiB of the whole model, before and after.

        Args:
            plan: The plan of the model.
            built: The loaded model.
            packed: Bytes of the packed weights, scales and zeros.
            bits: Bits per quantized weight.
        """
        dense = sum(
            tensor.numel() * tensor.element_size()
            for _, module, leaf, tensor in base_tensors(built.model)
            if not is_packed(module, leaf)
        )
        if not plan.packed:
            name = next(iter(built.settings.modules))
            source_bits = 8 * plan.reader.dtype(f"{name}.weight").itemsize
            gib = plan.reader.total_bytes / GIB
            self._row("full_precision", bits_per_weight=source_bits, gib=gib)
        seconds = None if plan.packed else built.seconds
        self._row("quantized", bits_per_weight=bits, gib=(dense + packed) / GIB, seconds=seconds)

    def _row(self, part: str, **values: Any) -> None:
        self._rows[part] = replace(self._rows[part], **values)
