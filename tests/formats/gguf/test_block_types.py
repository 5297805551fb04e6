"""Each layer gets the smallest type of GGUF that keeps its codes, or a reason why there is none."""

from dataclasses import replace

import pytest

from hqqtrain.formats.gguf.block_types import BLOCK_TYPES, block_type_refusals, choose_block_type
from hqqtrain.formats.quantized_settings import ModuleSettings, QuantizedSettings

MODULE = ModuleSettings(4, 64, 1, "hqq", "bfloat16", out_features=8, in_features=512)


@pytest.mark.parametrize(
    ("nbits", "in_features", "group_size", "kind"),
    [
        (8, 512, 64, "Q8_0"), (4, 512, 64, "Q4_K"), (4, 576, 64, "Q4_1"), (3, 512, 32, "Q4_K"),
        (3, 576, 32, "Q4_1"), (2, 512, 16, "Q2_K"), (2, 576, 64, "Q4_1"), (1, 512, None, "Q2_K"),
        (2, 576, 16, None), (4, 512, 16, None), (8, 520, 8, None), (8, 512, 8, "Q8_0"),
    ],
)  # fmt: skip
def test_the_type_of_auto(nbits, in_features, group_size, kind):
    module = replace(MODULE, nbits=nbits, in_features=in_features, group_size=group_size)
    chosen = choose_block_type(module, "auto")
    assert (chosen.name if chosen else None) == kind


def test_groups_along_columns_only_fit_where_weights_are_rounded_again():
    module = replace(MODULE, axis=0)
    assert choose_block_type(module, "auto") is None
    assert choose_block_type(module, "Q8_0") is BLOCK_TYPES["Q8_0"]


@pytest.mark.parametrize(
    ("asked", "module", "reason"),
    [
        ("Q2_K", MODULE, "x has 4 bits, which Q2_K cannot hold"),
        ("Q4_K", replace(MODULE, in_features=576),
         "x has rows of 576 weights, no multiple of 256, which Q4_K cannot hold"),
        ("auto", replace(MODULE, group_size=16),
         "x has groups of 16, no multiple of 32, which Q4_1 cannot hold"),
        ("auto", replace(MODULE, axis=0),
         r"x has groups along its columns (quant.axis=0), which Q4_1 cannot hold"),
    ],
)  # fmt: skip
def test_the_reason_of_a_refusal(asked, module, reason):
    (found,) = block_type_refusals(QuantizedSettings({"x": module}, ""), asked)
    assert found == f"{reason} (export.gguf_type=Q8_0 can, with 8.5 bits per weight)"


def test_mixed_bits_have_mixed_types():
    modules = {"x": MODULE, "y": replace(MODULE, nbits=2), "z": replace(MODULE, nbits=8)}
    assert not list(block_type_refusals(QuantizedSettings(modules, ""), "auto"))


def test_bits_per_weight():
    sizes = {name: kind.bits_per_weight for name, kind in BLOCK_TYPES.items()}
    assert sizes == {"Q4_1": 5, "Q4_K": 4.5, "Q2_K": 2.625, "Q8_0": 8.5}
