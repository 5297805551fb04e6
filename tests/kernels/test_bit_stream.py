"""The bit stream is the one that numpy packs bit by bit, for all bits and odd lengths."""

import numpy as np
import pytest
import torch

from hqqtrain_kernels.bit_stream import pack_bit_stream, unpack_bit_stream, words_of


@pytest.mark.parametrize("nbits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("n", [1, 5, 32, 40, 96])
def test_the_stream_is_least_significant_bit_first(nbits: int, n: int):
    codes = torch.randint(0, 2**nbits, (7, n), dtype=torch.uint8)
    packed = pack_bit_stream(codes, nbits)
    assert packed.dtype == torch.int32
    assert packed.shape == (7, words_of(n, nbits)) == (7, -(-n * nbits // 32))
    bits = ((codes.numpy()[..., None] >> np.arange(nbits, dtype=np.uint8)) & 1).reshape(7, -1)
    expected = np.packbits(bits, axis=1, bitorder="little")
    stream = packed.numpy().view(np.uint8)
    np.testing.assert_array_equal(stream[:, : expected.shape[1]], expected)
    assert not stream[:, expected.shape[1] :].any()
    assert torch.equal(unpack_bit_stream(packed, nbits, n), codes)
    transposed = packed.t().contiguous().t()
    assert torch.equal(unpack_bit_stream(transposed, nbits, n), codes)


def test_no_rows():
    packed = pack_bit_stream(torch.empty(0, 32, dtype=torch.uint8), 4)
    assert packed.shape == (0, 4)
    assert unpack_bit_stream(packed, 4, 32).shape == (0, 32)
