"""A value that is not finite is found late, and named with its tensor and row."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.loading.finite_check import DeferredFiniteCheck
from hqqtrain.loading.prefetch import RowRange


class DamagedSource:
    """Source whose tensor `b` has a NaN in row 4."""

    bytes_read = prefetch_depth = 0

    def shape(self, name: str) -> tuple[int, ...]:
        return (6, 3)

    def read(self, name: str, rows: list[slice] | None = None) -> torch.Tensor:
        W = torch.ones(6, 3)
        if name == "b":
            W[4, 1] = torch.nan
        return torch.cat([W[r] for r in rows]) if rows else W


def test_a_value_that_is_not_finite_is_named_later():
    source = DamagedSource()
    finite = DeferredFiniteCheck(source)
    rows = [slice(0, 2), slice(3, 6)]
    said = r"b: row 4 holds nan; 1 of 5 rows"
    with pytest.raises(UserError, match=said) as fault:  # noqa: PT012 (the test is in which turn it raises)
        for number, name in enumerate("abacad"):
            bad = ~torch.cat([source.read(name)[r] for r in rows]).isfinite().all()
            finite.add(RowRange(name, rows), bad)
            assert number < 4, "at most two results may be pending"
    assert "damaged" in str(fault.value)


def test_check_reads_all_pending_results():
    finite = DeferredFiniteCheck(DamagedSource())
    finite.add(RowRange("b", None), torch.tensor([1], dtype=torch.int32))
    with pytest.raises(UserError, match="b: row 4"):
        finite.check()
