"""The figures of task=data in words."""

import pytest

from hqqtrain.report.data_view import DataSample, Piece, percent


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0, "0 %"), (1, "100 %"), (0.123, "12.3 %"), (1e-4, "<0.1 %"), (0.9999, ">99.9 %")],
)
def test_only_all_is_100_percent(share: float, shown: str):
    assert percent(share) == shown


def test_hidden_tokens_are_counted():
    sample = DataSample("one", [Piece("a")], hidden_tokens=1)
    assert sample.hidden_note == "... 1 token not shown ..."
    assert DataSample("two", [], hidden_tokens=7).hidden_note == "... 7 tokens not shown ..."
