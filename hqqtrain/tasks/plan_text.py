"""The text of a plan: tables of memory, time and disk, and what to change."""

from collections.abc import Mapping, Sequence

from hqqtrain.common.text import count, short
from hqqtrain.loading.time_estimate import TimeEstimate
from hqqtrain.tasks.machine import OUTSIDE_BYTES
from hqqtrain.tasks.plan_changes import Change
from hqqtrain.tasks.prediction import Prediction

GIB = 2**30

_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))

Row = tuple[str, str, str]
"""Name, figure and note."""


def render_plan(plan: Prediction, changes: Sequence[Change] = ()) -> str:
    """Return the plan as lines of text, with the changes that were tried, if any."""
    parts = [
        _title(plan),
        _table(_memory_rows(plan)),
        *_time_tables(plan),
        _table(_disk_rows(plan)),
    ]
    if changes:
        rows = [("what helps, each tried", "GiB per GPU" if plan.machine.gpu else "GiB", "")]
        parts.append(_table(rows + [_change_row(change) for change in changes]))
    return "\n\n".join(parts) + "\n"


def _title(plan: Prediction) -> str:
    workload, train = plan.workload, plan.config.train
    bits = "full precision" if workload.nbits is None else count(workload.nbits, "bit")
    recomputed = workload.recomputed_layers(plan.num_layers)
    mode = workload.activation_checkpointing
    lines = [
        f"{workload.model_name}, {_billions(plan.parameters)} parameters in {bits}, "
        f"{_billions(plan.trained)} trained",
        f"{plan.machine}, parallel.strategy={plan.strategy}, {plan.precision}; micro-batches of "
        f"{workload.micro_batch_size} x {workload.max_seq_len:,} tokens",
        f"train.activation_checkpointing={train.activation_checkpointing}: {recomputed} of "
        f"{count(plan.num_layers, 'decoder layer')} recompute{' (offload)' * (mode == 'offload')}",
    ]
    return "\n".join(lines)


def _memory_rows(plan: Prediction) -> list[Row]:
    memory, machine = plan.memory, plan.machine
    rows: list[Row] = [("memory of each GPU" if machine.gpu else "memory", "GiB", "")]
    for name, size in memory.device.items():
        if size:
            rows.append((f"  {name}", short(size / GIB), _split(memory.split.get(name, {}))))
    rows.append(("  peak of the training", short(memory.peak / GIB), ""))
    if memory.calibration:
        rows.append(("  peak of the calibration", short(memory.calibration / GIB), "before it"))
    share = f"{plan.share:.0%} of {short(machine.usable / GIB)}: {_verdict(plan)}"
    rows.append(("  needed", short(plan.needed / GIB), share))
    if machine.gpu:
        rows.append(("  CUDA and its kernels", short(OUTSIDE_BYTES / GIB), "in addition"))
    if memory.host:
        rows.append(("  host memory of each rank", short(memory.host / GIB), ""))
    return rows


def _verdict(plan: Prediction) -> str:
    return "fits" if plan.fits else "may not fit" if plan.share <= 1 else "does not fit"


def _split(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {short(size / GIB)}" for name, size in parts.items() if size)


def _time_tables(plan: Prediction) -> list[str]:
    if not plan.times:
        return ["The speed of this machine is not known; give plan.gpu=NAME of a GPU for it."]
    if len(plan.times) > 1:
        rows = [("a GPU with this memory", "tokens/s", "")]
        rows += [
            (f"  {name}", f"{time.tokens_per_second:,.0f}", f"{_steps(plan, time)}")
            for name, time in plan.times.items()
        ]
        return [_table(rows)]
    ((name, time),) = plan.times.items()
    rows = [(f"a step on {name}", "ms", "")]
    rows += [(f"  {part}", f"{1e3 * seconds:,.1f}", "") for part, seconds in time.parts.items()]
    rows.append(("  all of these", f"{1e3 * time.work:,.1f}", ""))
    others = {"launches": time.launches, "communication": time.communication}
    rows += [
        (f"  {part}", f"{1e3 * seconds:,.1f}", "at the same time")
        for part, seconds in others.items()
        if seconds
    ]
    speed = f"{time.tokens_per_second:,.0f} tokens/s, limited by {time.limit}"
    mfu = plan.mfu(name)
    lines = [speed if mfu is None else f"{speed}; MFU {mfu:.1%}", _steps(plan, time)]
    return ["\n".join([_table(rows), *lines])]


def _steps(plan: Prediction, time: TimeEstimate) -> str:
    """Return how long the steps take; 1,000 of them if their number follows from the data."""
    steps = plan.config.train.max_steps or 1000
    return (
        f"{count(steps, 'step')} of {time.tokens:,} tokens take {_duration(steps * time.seconds)}"
    )


def _disk_rows(plan: Prediction) -> list[Row]:
    disk = plan.memory.disk
    rows = [(f"  {name}", short(size / GIB), "") for name, size in disk.items() if size]
    return [("disk", "GiB", ""), *rows, ("  all", short(sum(disk.values()) / GIB), "")]


def _change_row(change: Change) -> Row:
    plan = change.prediction
    speeds = [f"{time.tokens_per_second:,.0f} tokens/s" for time in plan.times.values()]
    notes = [_verdict(plan), *(speeds if len(speeds) == 1 else [])]
    return f"  {change}", short(plan.needed / GIB), ", ".join(notes)


def _table(rows: Sequence[Row]) -> str:
    """Return lines of three columns; the second one is aligned to the right."""
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{a:<{left}}  {b:>{middle}}  {c}".rstrip() for a, b, c in rows)


def _billions(number: int) -> str:
    """Return a number of parameters as 8.03 B or 41.9 M."""
    unit, size = ("B", 1e9) if number >= 1e9 else ("M", 1e6)
    return f"{number / size:.3g} {unit}"


def _duration(seconds: float) -> str:
    """Return a duration in the largest unit of which it has at least two."""
    name, size = next((u for u in _UNITS if seconds >= 2 * u[1]), _UNITS[-1])
    return f"{seconds / size:,.1f} {name}"
