"""The goals of the kernels on an H200, and whether the rows of a run reach them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from record import Row
from sizes import Sizes

Rows = Sequence[Row]


@dataclass(frozen=True)
class Goal:
    """One line of the table. `figure` is None if its part was not run, or a row is missing."""

    what: str
    goal: str
    figure: float | None
    shown: str
    passed: bool

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not run"
        return "pass" if self.passed else "missed"


def table(rows: Rows, sizes: Sizes) -> list[Goal]:
    """Return every goal, in the order of the parts."""
    parts = (_speeds, _axes, _memory, _dequantize, _training, _small, _python)
    return [goal for part in parts for goal in part(rows, sizes)]


def _find(rows: Rows, **wanted: object) -> Row | None:
    for row in rows:
        if all(getattr(row, key) == value for key, value in wanted.items()):
            return row
    return None


def _at_most(what: str, bound: float, figure: float | None, unit: str = " x") -> Goal:
    shown = "" if figure is None else f"{figure:.3f}{unit}"
    return Goal(what, f"at most {bound:g}{unit}", figure, shown,
                figure is not None and figure <= bound)  # fmt: skip


def _at_least(what: str, goal: str, bound: float, figure: float | None, shown: str) -> Goal:
    return Goal(what, goal, figure, shown if figure is not None else "",
                figure is not None and figure >= bound)  # fmt: skip


def _speeds(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for solver, times in (("hqq", 200), ("least_squares", 75), ("rtn", 500)):
        for kind in ("normal", "heavy-tailed"):
            for nbits in (4, 2):
                row = _find(rows, what=f"quantize {kind}", nbits=nbits, axis=1,
                            provider=f"ours, {solver}")  # fmt: skip
                speed = 1 / row.ratio if row and row.ratio else None
                shown = f"{speed:.1f} x ({row.note})" if row and speed else ""
                what = f"quantize 70B, {solver}, {nbits}-bit, {kind}"
                yield _at_least(what, f"{times} x hqq", times, speed, shown)


def _axes(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for solver in ("hqq", "least_squares", "rtn"):
        for nbits in (4, 2):
            pair = [
                _find(rows, what="quantize normal", nbits=nbits, axis=axis,
                      provider=f"ours, {solver}")
                for axis in (0, 1)
            ]  # fmt: skip
            yield _at_most(f"quantize axis 0 over axis 1, {solver}, {nbits}-bit", 1.3, _over(*pair))


def _memory(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for solver in ("hqq", "least_squares", "rtn"):
        for nbits in (4, 2):
            row = _find(rows, what="peak memory", nbits=nbits, provider=f"ours, {solver}")
            what = f"peak over weight + result, {solver}, {nbits}-bit"
            yield _at_most(what, 1.05, row and row.ratio)


def _dequantize(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for out, width in sizes.outputs:
        for nbits in (8, 4, 3, 2, 1):
            shape = f"{out}x{width}"
            row = _find(rows, what="dequantize", shape=shape, nbits=nbits, axis=1, provider="ours")
            share = row and row.share
            shown = f"{share:.1%}" if share else ""
            what = f"dequantize {shape}, {nbits}-bit"
            yield _at_least(what, "88 % of a copy", 0.88, share, shown)


def _training(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for M, bound in ((8192, 1.03), (2048, 1.12)):
        for nbits in (4, 2):
            row = _find(rows, what=f"forward+backward M={M}", nbits=nbits, provider="ours")
            what = f"forward+backward over cuBLAS, M={M}, {nbits}-bit"
            yield _at_most(what, bound, row and row.ratio)


def _small(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for M in (1, 16):
        for nbits, bound in ((4, 0.40), (2, 0.30)):
            row = _find(rows, what=f"forward M={M}", nbits=nbits, provider="ours")
            yield _at_most(f"forward over cuBLAS, M={M}, {nbits}-bit", bound, row and row.ratio)
    for nbits in (4, 2):
        pair = [
            _find(rows, what="forward M=128", nbits=nbits, provider=provider)
            for provider in ("ours", "ours, dequantize + cuBLAS")
        ]
        what = f"forward over dequantize + cuBLAS, M=128, {nbits}-bit"
        yield _at_most(what, 1.0, _over(*pair))


def _python(rows: Rows, sizes: Sizes) -> Iterator[Goal]:
    for way, bound in (("no_grad", 15), ("forward+backward", 40)):
        for M in (1, 512):
            ours, base = (
                _find(rows, part="overhead", what=f"{way} M={M}", provider=provider)
                for provider in ("ours", "F.linear")
            )
            more = 1e3 * (ours.ms - base.ms) if ours and base and ours.ms and base.ms else None
            yield _at_most(f"Python over F.linear, {way}, M={M}", bound, more, " us")


def _over(row: Row | None, base: Row | None) -> float | None:
    return row.ms / base.ms if row and base and row.ms and base.ms else None


Part = Callable[[Rows, Sizes], Iterator[Goal]]
