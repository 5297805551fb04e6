"""Packing, compared with a packer that follows its definition bit by bit, and dequantizing."""

import pytest
import torch

from hqqtrain_kernels import Layout, pack, reference, unpack
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


@pytest.mark.parametrize("axis", [0, 1])
def test_dequantizing_in_chunks_changes_nothing(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(48, 64, 3, 16, axis)
    W_q = pack(random_codes(layout.units, layout.unit_codes, 3), 3)
    scale, zero = torch.rand(2, layout.units, layout.groups)
    whole = reference.dequantize(W_q, scale, zero, layout, torch.float32)
    monkeypatch.setattr(reference, "CHUNK_CODES", layout.unit_codes * 2 + 1)
    assert torch.equal(reference.dequantize(W_q, scale, zero, layout, torch.float32), whole)


@pytest.mark.parametrize("nbits", NBITS)
def test_the_formula_in_fp64_rounded_once(nbits: int) -> None:
    layout = Layout(6, 40, nbits, 8, 1)
    codes = random_codes(6, 40, nbits)
    # Differences and products of these numbers have few bits: fp32 represents them exactly.
    scale = torch.randint(1, 256, (6, 5)) / 1024
    zero = torch.randint(0, 256, (6, 5)) / 8
    groups = codes.view(6, 5, 8).double()
    W = ((groups - zero[..., None]) * scale[..., None]).view(6, 40)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        got = reference.dequantize(pack(codes, nbits), scale, zero, layout, dtype)
        assert torch.equal(got, W.float().to(dtype))


@pytest.mark.parametrize(
    ("dtype", "smallest"),
    [(torch.float16, 2.0**-24), (torch.bfloat16, 2.0**-126), (torch.float32, 2.0**-126)],
)
def test_the_smallest_scale_survives_storage(dtype, smallest):
    assert reference.min_stored_scale(dtype) == smallest
    assert torch.tensor(smallest).to(dtype).float() == smallest
