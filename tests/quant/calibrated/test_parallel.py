"""Parts keep their order, run on one thread each, and raise their errors."""

import threading
import time

import pytest
import torch

from hqqtrain.quant.calibrated.parallel import iterate_in_order, map_in_order, one_thread

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_from_threads_with_one_thread_each(threads: int) -> None:
    def work(part: int) -> tuple[int, int, int]:
        time.sleep(0.01 * (part % 3 == 0))
        return part, torch.get_num_threads(), threading.get_ident()

    results = map_in_order(work, range(12), CPU)
    assert [part for part, *_ in results] == list(range(12))
    assert {used for _, used, _ in results} == {1}
    assert len({thread for *_, thread in results}) <= threads
    assert torch.get_num_threads() == threads


def test_an_error_of_a_part_is_raised_in_its_place(threads: int) -> None:
    def work(part: int) -> int:
        if part == 2:
            raise ValueError("part 2")
        return part

    found = []
    with pytest.raises(ValueError, match="part 2"):
        found.extend(iterate_in_order(work, range(5), CPU))
    results = iterate_in_order(work, range(2), CPU)
    assert list(results) == [0, 1]
    assert torch.get_num_threads() == threads


def test_few_parts_are_in_memory(threads: int) -> None:
    started = []
    results = iterate_in_order(started.append, range(20), CPU)
    next(results)
    time.sleep(0.05)
    assert len(started) <= threads
    results.close()
    assert torch.get_num_threads() == threads


def test_one_thread_restores(threads: int) -> None:
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
