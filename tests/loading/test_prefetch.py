"""Pieces arrive in order while the next one is read; errors arrive with their piece."""

import threading

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.loading.prefetch import Prefetcher, RowRange

CPU = torch.device("cpu")


class Source:
    """Source of one-element tensors that records which thread read what."""

    def __init__(self, prefetch_depth: int) -> None:
        self.bytes_read, self.prefetch_depth = 0, prefetch_depth
        self.read_names: list[str] = []
        self.threads: set[int] = set()

    def shape(self, name: str) -> tuple[int, ...]:
        return (1,)

    def read(self, name: str, rows: list[slice] | None = None) -> torch.Tensor:
        self.threads.add(threading.get_ident())
        if name == "bad":
            raise UserError("bad: damaged")
        self.read_names.append(name)
        return torch.tensor([float(name)])


def pieces(*names: object) -> list[RowRange]:
    return [RowRange(str(name), None) for name in names]


@pytest.mark.parametrize("prefetch_depth", [0, 1, 3])
def test_order_and_prefetch_limit(prefetch_depth):
    source = Source(prefetch_depth)
    with Prefetcher(source, pieces(*range(8)), CPU) as arriving:
        for number, tensor in enumerate(arriving):
            assert tensor.item() == number
            assert len(source.read_names) <= number + 1 + prefetch_depth
    assert source.read_names == [str(i) for i in range(8)]
    assert (threading.get_ident() in source.threads) == (prefetch_depth == 0)


def test_next_piece_is_read_in_the_background():
    source = Source(1)
    with Prefetcher(source, pieces(0, 1, 2), CPU) as arriving:
        next(arriving)
        for _ in range(1000):
            if source.read_names == ["0", "1"]:
                return
            threading.Event().wait(0.005)
    pytest.fail(f"only {source.read_names} read")


@pytest.mark.parametrize("prefetch_depth", [0, 1])
def test_an_error_is_raised_with_its_piece(prefetch_depth):
    with Prefetcher(Source(prefetch_depth), pieces(0, "bad", 2), CPU) as arriving:
        assert next(arriving) == 0
        with pytest.raises(UserError, match="bad: damaged"):
            next(arriving)


def test_leaving_early_ends_the_thread():
    before = threading.active_count()
    prefetcher = Prefetcher(Source(1), pieces(*range(9)), CPU)
    with pytest.raises(KeyboardInterrupt), prefetcher as arriving:  # noqa: PT012 (the body leaves early)
        next(arriving)
        raise KeyboardInterrupt
    assert threading.active_count() == before


class Pinned(Source):
    """Source of 4 million elements per piece, so that copies take a while."""

    def read(self, name: str, rows: list[slice] | None = None) -> torch.Tensor:
        return torch.full((1 << 22,), float(name), pin_memory=True)


@pytest.mark.gpu
@pytest.mark.parametrize("prefetch_depth", [0, 1, 3])
def test_a_gpu_waits_for_its_copy(prefetch_depth):
    device = torch.device("cuda:0")
    with Prefetcher(Pinned(prefetch_depth), pieces(*range(40)), device) as arriving:
        sums = [(piece - number).abs().sum() for number, piece in enumerate(arriving)]
    assert torch.stack(sums).sum().item() == 0
    assert {total.device for total in sums} == {device}
