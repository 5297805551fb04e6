"""Where the time of training steps goes: the events of a trace, added up by part.

A trace of a GPU has its kernels and copies; a trace of a CPU has the operations of PyTorch, of
which each counts without those that it calls. The names tell the part, by the table `PATTERNS`.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

PATTERNS = (
    ("communication", r"nccl|gloo|c10d|all_?reduce|all_?gather|reduce_?scatter|memcpy ptop"),
    ("data", r"memcpy (htod|dtoh)|dataloader"),
    ("attention", r"flash|fmha|sdpa|scaled_dot_product|attention|attn|aten::_?softmax"),
    ("dequantization", r"dequantize"),
    ("loss", r"cross_entropy|nll_loss|softmax|fused_linear_loss"),
    ("optimizer", r"adam|optimizer|multi_tensor|_foreach_|lpnorm|addcdiv|clip_grad"),
    (
        "products",
        r"gemm|gemv|nvjet|cutlass|cublas|xmma|wgmma|splitk|hqqtrain::\w*linear|mkldnn|"
        r"\b(mm|addmm|addmv|bmm|baddbmm|matmul|linear|einsum|mv|dot)\b",
    ),
    ("elementwise", r""),
)  # fmt: skip
"""Parts and patterns of the names of their events; the first one that is found decides.

Products are multiplications of matrices. Everything that no other pattern names is elementwise:
activations, norms, rotary embeddings, sums, casts and copies within a device.
"""

PARTS = (*(part for part, _ in PATTERNS), "idle")
_COMPILED = [(part, re.compile(pattern, re.IGNORECASE)) for part, pattern in PATTERNS]
_DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_STEP = "ProfilerStep"


@dataclass(frozen=True)
class PartTime:
    """The time of a part in a step.

    Attributes:
        part: One of `PARTS`.
        milliseconds: Time of its events per step; `idle`: time without any event.
        share: Fraction of the time of all events; `idle`: fraction of the whole time.
        calls: Events per step.
    """

    part: str
    milliseconds: float
    share: float
    calls: float


def part_of(name: str) -> str:
    """Return the part of an event by its name."""
    return next(part for part, pattern in _COMPILED if pattern.search(name))


def step_parts(events: Iterable[Mapping[str, Any]]) -> list[PartTime]:
    """Add up the events of a trace by part, in the order of `PARTS`.

    Args:
        events: `traceEvents` of a Chrome trace that torch.profiler has written, with its steps.

    Raises:
        ValueError: The trace has no steps, or no events in them.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    steps = [e for e in complete if e["name"].startswith(_STEP) and e["cat"] == "user_annotation"]
    on_device = [(e, e["dur"]) for e in complete if e.get("cat") in _DEVICE_CATEGORIES]
    timed = on_device or list(_own_times(complete))
    if not steps or not timed:
        raise ValueError("the trace has no steps")
    times, calls, count = Counter[str](), Counter[str](), len(steps)
    for event, microseconds in timed:
        part = part_of(event["name"])
        times[part] += microseconds
        calls[part] += 1
    spans = [(event["ts"], _end(event)) for event, _ in timed]
    begin = min(event["ts"] for event in steps)
    end = max(_end(event) for event in [*steps, *(event for event, _ in timed)])
    total, idle = sum(times.values()), end - begin - _covered(spans)
    rows = [
        PartTime(part, times[part] / count / 1e3, times[part] / total, calls[part] / count)
        for part, _ in PATTERNS
    ]
    return [*rows, PartTime("idle", idle / count / 1e3, idle / (end - begin), 0.0)]


def _own_times(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], float]]:
    """Yield each operation of the CPU, and its microseconds without the operations in it."""
    threads = defaultdict(list)
    for event in events:
        if event.get("cat") == "cpu_op":
            threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        inner = [0.0] * len(thread)
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        open_calls: list[int] = []
        for index, event in enumerate(thread):
            while open_calls and _end(thread[open_calls[-1]]) <= event["ts"]:
                open_calls.pop()
            if open_calls:
                inner[open_calls[-1]] += event["dur"]
            open_calls.append(index)
        yield from ((e, max(0.0, e["dur"] - part)) for e, part in zip(thread, inner, strict=True))


def _end(event: Mapping[str, Any]) -> float:
    return event["ts"] + event["dur"]


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    covered, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered
