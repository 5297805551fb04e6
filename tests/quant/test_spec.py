"""The settings of one weight: resolving the configuration and checking the shape."""

import pytest
import torch

from hqqtrain.common.errors import UserError
from hqqtrain.config.quant import QuantConfig
from hqqtrain.quant.error import storage_bits
from hqqtrain.quant.quantize import quantize_weight
from hqqtrain.quant.spec import QuantSpec, spec_from_config


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
def test_meta_dtype_auto_depends_on_nbits(nbits: int) -> None:
    config = QuantConfig(nbits=4)
    expected = torch.float32 if nbits == 8 else torch.bfloat16
    assert spec_from_config(config, {"nbits": nbits}).meta_dtype == expected
    assert spec_from_config(QuantConfig(nbits=nbits)).meta_dtype == expected
    fixed = QuantConfig(nbits=nbits, meta_dtype="fp16")
    assert spec_from_config(fixed).meta_dtype == torch.float16


def test_overrides_replace_settings() -> None:
    config = QuantConfig(nbits=2, group_size=64, axis=1, solver="hqq")
    spec = spec_from_config(config, {"nbits": 3, "group_size": None, "axis": 0})
    assert spec == QuantSpec(3, None, 0, "hqq", torch.bfloat16)


def test_group_size_null_is_the_whole_row_or_column() -> None:
    assert QuantSpec(4, None, 1, "rtn", torch.float32).layout(6, 10).group_size == 10
    assert QuantSpec(4, None, 0, "rtn", torch.float32).layout(6, 10).group_size == 6


@pytest.mark.parametrize(
    ("axis", "message"),
    [(1, r"in_features=256 of model\.q .*32 or 64"), (0, r"out_features=96 of model\.q .*32 or")],
)
def test_a_group_size_that_does_not_divide(axis: int, message: str) -> None:
    spec = QuantSpec(4, 48 if axis else 40, axis, "rtn", torch.float32)
    with pytest.raises(UserError, match=message):
        spec.layout(96, 256, "model.q")
    with pytest.raises(UserError, match=r"quant\.group_size="):
        quantize_weight(torch.randn(96, 256), spec)


@pytest.mark.parametrize("length", [1, 2, 7, 251])
def test_the_message_copes_with_prime_lengths(length: int) -> None:
    with pytest.raises(UserError, match=f"in_features={length} .*or null"):
        QuantSpec(4, 64, 1, "rtn", torch.float32).layout(4, length)


@pytest.mark.parametrize(
    ("nbits", "group_size", "expected"),
    [(2, 64, 2.5), (4, 64, 4.5), (3, 64, 3.5), (2, 8, 6.0), (1, 128, 1.25), (8, 64, 9.0)],
)
def test_bits_per_weight_counts_everything(nbits: int, group_size: int, expected: float) -> None:
    meta_dtype = torch.float32 if nbits == 8 else torch.bfloat16
    spec = QuantSpec(nbits, group_size, 1, "rtn", meta_dtype)
    assert storage_bits(spec.layout(8, 512), meta_dtype) / (8 * 512) == expected


@pytest.mark.parametrize("axis", [0, 1])
def test_stored_bits_are_those_of_the_tensors(axis: int) -> None:
    spec = QuantSpec(3, None, axis, "rtn", torch.bfloat16)
    q = quantize_weight(torch.randn(20, 50), spec)  # rows that need padding
    stored = 8 * (q.W_q.nbytes + q.scale.nbytes + q.zero.nbytes)
    assert storage_bits(spec.layout(20, 50), torch.bfloat16) == stored
