"""The relative error has one definition, for a weight and for sums over ranks."""

import pytest
import torch

from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.loading.load import LoadResult
from hqqtrain.loading.stats import MemoryTracker
from hqqtrain.quant.error import error_ratio, relative_error, squared_error


def test_an_all_zero_weight_has_no_error():
    assert error_ratio(0.0, 0.0) == 0
    assert error_ratio(2.0, 0.0) == float("inf")
    assert error_ratio(1.0, 4.0) == 0.25


def test_loading_reports_the_same_error_as_relative_error():
    W, approximation = torch.randn(8, 16), torch.randn(8, 16)
    zeros = torch.zeros(2, 2)
    squared = {"a": squared_error(W, approximation), "b": squared_error(zeros, zeros)}
    stats = MemoryTracker(torch.device("cpu")).stats(0, 0, 0.0, 1.0)
    by_layer, total = LoadResult(squared, stats).relative_errors(SINGLE_PROCESS)
    expected = relative_error(W, approximation)
    assert by_layer == {"a": pytest.approx(expected), "b": 0}
    assert total == pytest.approx(expected)
