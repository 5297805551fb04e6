"""The packed format, compared with a packer that follows its definition bit by bit."""

import pytest
import torch

from hqqtrain_kernels import Layout, pack, unpack
from hqqtrain_kernels.layout import packed_bytes

NBITS = (8, 4, 3, 2, 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def naive_pack(codes: list[int], width: int) -> bytes:
    """Pack one plane: field i of halfword h of a 16-byte tile is code 8 * i + h of the tile."""
    per_tile = 128 // width
    packed = b""
    for start in range(0, len(codes), per_tile):
        halfwords = [0] * 8
        for k, code in enumerate(codes[start : start + per_tile]):
            halfwords[k % 8] |= code << (width * (k // 8))
        packed += b"".join(h.to_bytes(2, "little") for h in halfwords)
    return packed


def random_codes(units: int, n: int, nbits: int) -> torch.Tensor:
    return torch.randint(0, 1 << nbits, (units, n), dtype=torch.uint8)


@pytest.mark.parametrize("n", [1, 8, 15, 64, 127, 128, 200, 384])
@pytest.mark.parametrize("nbits", NBITS)
def test_bits_lie_where_the_definition_puts_them(nbits: int, n: int) -> None:
    codes = random_codes(3, n, nbits)
    W_q = pack(codes, nbits)
    for row, packed in zip(codes.tolist(), W_q, strict=True):
        if nbits == 3:
            expected = naive_pack([c & 3 for c in row], 2) + naive_pack([c >> 2 for c in row], 1)
        else:
            expected = naive_pack(row, nbits)
        assert bytes(packed.tolist()) == expected
    assert W_q.shape == (3, packed_bytes(n, nbits))
    assert W_q.shape[1] % 16 == 0
    assert torch.equal(unpack(W_q, nbits, n), codes)


@pytest.mark.parametrize("view", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float_view_is_the_same_bits(view: torch.dtype) -> None:
    codes = random_codes(4, 96, 4)
    assert torch.equal(unpack(pack(codes, 4).view(view), 4, 96), codes)


def test_every_pattern_of_two_bytes_survives() -> None:
    W_q = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(512, 128).view(torch.uint8)
    for nbits in (8, 4, 2, 1):
        codes = unpack(W_q, nbits, W_q.shape[1] * 8 // nbits)
        assert torch.equal(pack(codes, nbits), W_q)


@pytest.mark.parametrize("nbits", NBITS)
def test_whole_tiles_cost_exactly_nbits(nbits: int) -> None:
    layout = Layout(10, 256, nbits, 64, 1)
    assert 8 * layout.row_bytes == nbits * 256


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_a_slice_of_packed_units_is_the_packed_slice(nbits: int, axis: int) -> None:
    layout = Layout(24, 40, nbits, 8, axis)
    W = torch.randint(0, 1 << nbits, (24, 40), dtype=torch.uint8)
    whole = pack(as_units(W, layout), nbits)
    for start, stop in ((0, 1), (1, 3), (2, layout.units), (0, layout.units)):
        rows = torch.cat([W[part] for part in layout.rows_of(start, stop)])
        part = layout.slice(start, stop)
        assert rows.shape == (part.out_features, part.in_features)
        assert torch.equal(pack(as_units(rows, part), nbits), whole[start:stop])


def as_units(W: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Return [units, row_codes], with rows r, r + units, ... of every class as hqq groups them."""
    if layout.axis == 1:
        return W
    classes = [W[r :: layout.units].T.flatten() for r in range(layout.units)]
    return torch.stack(classes)


def test_groups_of_axis_0_are_those_of_hqq() -> None:
    layout = Layout(12, 5, 8, 4, 0)
    W = torch.arange(60, dtype=torch.uint8).view(12, 5)
    hqq_groups = W.reshape(4, -1).T  # column j of hqq's [group_size, -1] is its group j
    assert torch.equal(as_units(W, layout).view(-1, 4), hqq_groups)


@pytest.mark.parametrize(
    "wrong",
    [
        {"nbits": 5},
        {"axis": 2},
        {"group_size": 48},
        {"group_size": 0},
        {"out_features": 0},
        {"axis": 0, "group_size": 100},
    ],
)
def test_refuses_an_impossible_layout(wrong: dict[str, int]) -> None:
    sizes = {"out_features": 128, "in_features": 64, "nbits": 4, "group_size": 32, "axis": 1}
    with pytest.raises(ValueError, match=str(wrong[list(wrong)[-1]])):
        Layout(**(sizes | wrong))
