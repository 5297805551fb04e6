"""Streams of codes, compared with one long number."""

import pytest
import torch
from packers import words

from hqqtrain.models.foreign.bit_stream import unpack_words, words_of


@pytest.mark.parametrize("nbits", [8, 4, 3, 2])
@pytest.mark.parametrize("count", [1, 7, 32, 33, 64, 100])
def test_codes_are_read_across_words(nbits, count):
    codes = torch.randint(0, 1 << nbits, (5, count))
    packed = words(codes, nbits)
    assert packed.shape == (5, words_of(count, nbits))
    assert torch.equal(unpack_words(packed, nbits, count), codes.to(torch.uint8))
    transposed = packed.t().contiguous().t()
    assert torch.equal(unpack_words(transposed, nbits, count), codes.to(torch.uint8))
