"""The converters, compared with how the installed hqq packs, unpacks and dequantizes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hqqtrain_kernels import Layout, convert, pack, unpack
from hqqtrain_kernels.convert import from_hqq, to_hqq
from hqqtrain_kernels.reference import dequantize

quantizer = pytest.importorskip("hqq.core.quantize", reason="hqq is not installed here")
Quantizer = quantizer.Quantizer

NBITS = (8, 4, 3, 2, 1)
SHAPES = {  # by axis: out_features, in_features, group_size
    1: [(48, 64, 16), (24, 88, 8), (8, 1000, 1000), (16, 21, 7)],
    0: [(48, 64, 16), (16, 21, 8), (40, 7, 40), (128, 9, 32)],
}
CASES = [
    (nbits, axis, *shape) for nbits in NBITS for axis in (1, 0) for shape in SHAPES[axis]
]  # fmt: skip


def by_hqq(
    nbits: int, axis: int, shape: tuple[int, int], g: int, view: torch.dtype | None = None
) -> tuple[Tensor, dict]:
    torch.manual_seed(0)
    return Quantizer.quantize(
        torch.randn(shape) * 0.02, nbits=nbits, axis=axis, group_size=g, device="cpu",
        bitpack=True, view_as_float=view is not None, compute_dtype=view or torch.float32,
    )  # fmt: skip


def dequantized_by_hqq(W_q: Tensor, meta: dict) -> Tensor:
    return Quantizer.dequantize(W_q, meta | {"compute_dtype": torch.float32})


def random_codes(layout: Layout) -> Tensor:
    return torch.randint(0, 1 << layout.nbits, (layout.units, layout.unit_codes)).to(torch.uint8)


@pytest.mark.parametrize(("nbits", "axis", "out", "columns", "g"), CASES)
def test_converted_weights_are_equal_and_convert_back_bit_for_bit(
    device: torch.device, nbits: int, axis: int, out: int, columns: int, g: int
) -> None:
    layout = Layout(out, columns, nbits, g, axis)
    W_q, meta = by_hqq(nbits, axis, (out, columns), g)
    theirs = [part.to(device) for part in (W_q, meta["scale"], meta["zero"])]
    ours = from_hqq(*theirs, layout)
    assert ours[0].shape == (layout.units, layout.unit_bytes)
    assert ours[1].shape == ours[2].shape == (layout.units, layout.groups)
    weight = dequantize(*ours, layout, torch.float32)
    assert torch.equal(weight.cpu(), dequantized_by_hqq(W_q, meta))
    for back, expected in zip(to_hqq(*ours, layout), theirs, strict=True):
        assert back.dtype == expected.dtype
        assert torch.equal(back, expected)


@pytest.mark.parametrize("view", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("nbits", NBITS)
def test_a_float_view_on_either_side_is_the_same_bits(
    nbits: int, axis: int, view: torch.dtype
) -> None:
    layout = Layout(48, 64, nbits, 16, axis)
    viewed, meta = by_hqq(nbits, axis, (48, 64), 16, view)
    W_q, _ = by_hqq(nbits, axis, (48, 64), 16)
    ours = from_hqq(viewed, meta["scale"], meta["zero"], layout)
    assert viewed.dtype == view
    assert torch.equal(ours[0], from_hqq(W_q, meta["scale"], meta["zero"], layout)[0])
    back, *_ = to_hqq(ours[0].view(view), *ours[1:], layout)
    assert torch.equal(back, W_q)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_code_survives_both_ways(data: st.DataObject) -> None:
    nbits, axis = data.draw(st.sampled_from(NBITS)), data.draw(st.sampled_from((0, 1)))
    g = data.draw(st.sampled_from((8, 16, 24, 40)))
    units, other = data.draw(st.integers(1, 5)) * 8, data.draw(st.integers(1, 30))
    shape = (units, g * (other % 3 + 1)) if axis == 1 else (units * g, other)
    layout = Layout(*shape, nbits, g, axis)
    codes = random_codes(layout)
    meta = torch.rand(layout.units, layout.groups)
    parts = data.draw(st.sampled_from((1, 3 * layout.unit_codes, 1 << 24)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "CHUNK_CODES", parts)
        W_q, scale, zero = to_hqq(pack(codes, nbits), meta, meta + 1, layout)
        ours = from_hqq(W_q, scale, zero, layout)
    theirs = Quantizer.unpack[Quantizer.bit_to_packing[nbits]](W_q)
    groups = codes.view(-1, g) if axis == 1 else codes.view(-1, g).t()
    assert torch.equal(theirs[: len(groups)], groups)  # hqq pads the rows of 3-bit codes
    assert not theirs[len(groups) :].any()
    assert torch.equal(unpack(ours[0], nbits, layout.unit_codes), codes)
    assert torch.equal(ours[1], meta)
    assert torch.equal(ours[2], meta + 1)


def test_errors_say_what_was_expected() -> None:
    layout = Layout(16, 64, 4, 32, 1)
    W_q, meta = by_hqq(4, 1, (16, 64), 32)
    ours = from_hqq(W_q, meta["scale"], meta["zero"], layout)
    with pytest.raises(ValueError, match=r"W_q is \[16, 32\] torch.int32: expected \[16, 32\]"):
        from_hqq(W_q.int(), meta["scale"], meta["zero"], layout)
    with pytest.raises(ValueError, match=r"W_q is \[15, 32\] .* expected \[16, 32\] torch.uint8"):
        from_hqq(W_q[1:], meta["scale"], meta["zero"], layout)
    with pytest.raises(ValueError, match=r"zero is \[1, 32\] .* expected \[32, 1\]"):
        from_hqq(W_q, meta["scale"], meta["zero"].t(), layout)
    with pytest.raises(ValueError, match=r"W_q is \[16, 16\] .* expected \[16, 32\]"):
        to_hqq(ours[0][:, :16], *ours[1:], layout)
    with pytest.raises(ValueError, match=r"scale is \[2, 16\] .* expected \[16, 2\]"):
        to_hqq(ours[0], ours[1].t(), ours[2], layout)
    with pytest.raises(
        ValueError, match=r"packs 2 rows of 4-bit codes into one, and cannot pack 3 rows"
    ):
        to_hqq(*ours, Layout(3, 32, 4, 32, 1))
