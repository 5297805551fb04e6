"""Patterns that select modules by the end of their name, by glob or by hqq's tag."""

import pytest
from hqq.models.base import name_to_linear_tag
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from hqqtrain.common.errors import UserError
from hqqtrain.nn.patterns import hqq_tag, matches_pattern, matching_modules, resolve_overrides

NAMES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize("name", [*NAMES, "model.layers.3.mlp.experts.7.w1", "layers", "0", ""])
def test_the_tag_is_that_of_hqq(name: str) -> None:
    assert hqq_tag(name) == name_to_linear_tag(name)


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("lm_head", [3]),
        ("self_attn.q_proj", [0, 2]),
        ("*.q_proj", [0, 2]),
        ("model.layers.?.*", [0, 1]),
        ("model.layers.[0-9].self_attn.*", [0]),
        ("*.Q_PROJ", []),  # case counts
        ("q_proj", [0, 2]),  # the end of a name, as in PEFT
        ("10.self_attn.q_proj", [2]),
        ("0.self_attn.q_proj", [0]),  # whole parts: not layer 10
        ("proj", []),
        ("self_attn", []),
        ("self_attn.*", []),  # a glob is matched with full names only
    ],
)
def test_globs_and_tags(pattern: str, matched: list[int]) -> None:
    assert [i for i, name in enumerate(NAMES) if matches_pattern(pattern, name)] == matched


@pytest.mark.parametrize("target", ["q_proj", "self_attn.q_proj", "10.self_attn.q_proj", "proj"])
def test_ends_of_names_are_read_as_in_peft(target: str) -> None:
    config = LoraConfig(target_modules=[target])
    theirs = [name for name in NAMES if check_target_module_exists(config, name)]
    assert [name for name in NAMES if matches_pattern(target, name)] == theirs


def test_names_come_in_their_order_and_once() -> None:
    names = matching_modules("quant.skip", ["lm_head", "*.q_proj", "self_attn.q_proj"], iter(NAMES))
    assert names == [NAMES[0], NAMES[2], NAMES[3]]
    assert matching_modules("quant.skip", [], NAMES) == []


def test_a_pattern_without_a_match_is_an_error_with_a_suggestion() -> None:
    with pytest.raises(UserError) as error:
        matching_modules("quant.skip", ["*.q_proj", "self_attn.q_porj"], NAMES)
    message = str(error.value)
    assert message.startswith("quant.skip=self_attn.q_porj: matches no linear layer.")
    assert "Did you mean 'self_attn.q_proj'" in message
    assert "names, such as q_proj, up_proj, lm_head, globs" in message
    assert "tags: self_attn.q_proj, mlp.up_proj, lm_head." in message


def test_later_overrides_take_precedence_and_null_excludes() -> None:
    overrides = {"*.mlp.*": {"nbits": 3, "axis": 0}, "mlp.up_proj": {"nbits": 8}, "*.10.*": None}
    assert resolve_overrides(NAMES[1], overrides) == (True, {"nbits": 8, "axis": 0})
    assert resolve_overrides(NAMES[2], overrides)[0] is False
    assert resolve_overrides(NAMES[3], overrides) == (True, {})
    back = {"*.10.*": None, "*.q_proj": {"nbits": 2}}
    assert resolve_overrides(NAMES[2], back) == (True, {"nbits": 2})
