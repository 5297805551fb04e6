"""Expanding a sweep into the command lines of its jobs."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose.compose import compose_config
from hqqtrain.compose.expand import expand_jobs


def test_nothing_to_sweep_is_the_command_itself():
    words = ["recipe=tiny_2bit", "quant.nbits=3"]
    assert expand_jobs(words, multirun=False) == [words]
    assert expand_jobs(words, multirun=True) == [words]


def test_every_combination_in_order():
    assert expand_jobs(
        ["quant.nbits=2,3", "task=eval", "quant.group_size=32,null"], multirun=True
    ) == [
        ["quant.nbits=2", "task=eval", "quant.group_size=32"],
        ["quant.nbits=2", "task=eval", "quant.group_size=null"],
        ["quant.nbits=3", "task=eval", "quant.group_size=32"],
        ["quant.nbits=3", "task=eval", "quant.group_size=null"],
    ]


def test_ranges_and_lists_as_values():
    assert expand_jobs(["quant.nbits=range(1,4)"], multirun=True) == [
        [f"quant.nbits={n}"] for n in (1, 2, 3)
    ]
    words = expand_jobs(["quant.skip=[lm_head],[lm_head,'*.o_proj']"], multirun=True)
    assert [compose_config(job).quant.skip for job in words] == [
        ["lm_head"],
        ["lm_head", "*.o_proj"],
    ]


def test_recipes_can_be_swept_and_bring_their_own_sweeps():
    found = expand_jobs(["recipe=tiny_2bit,sweep_bits"], multirun=True)
    assert found[0] == ["recipe=tiny_2bit"]
    assert found[1:] == [
        ["recipe=sweep_bits", f"quant.nbits={nbits}", f"quant.group_size={size}"]
        for nbits in (4, 3, 2, 1)
        for size in (32, 64, 128)
    ]


def test_a_key_given_on_the_command_line_is_swept_no_more():
    assert expand_jobs(["recipe=sweep_bits", "quant.nbits=3"], multirun=False) == [
        ["recipe=sweep_bits", "quant.nbits=3", f"quant.group_size={size}"] for size in (32, 64, 128)
    ]


def test_the_jobs_of_a_sweep_get_a_name_each():
    names = {
        compose_config(job).run_name() for job in expand_jobs(["recipe=sweep_bits"], multirun=False)
    }
    assert len(names) == 12


def test_several_values_without_asking_for_a_sweep():
    with pytest.raises(UserError, match="a sweep needs -m"):
        expand_jobs(["quant.nbits=2,3"], multirun=False)


@pytest.mark.parametrize("words", ["quant.nbits=glob(*)", "optim.lr=interval(0,1)"])
def test_what_has_no_list_of_values_is_refused(words):
    with pytest.raises(UserError, match="sweep over a list"):
        expand_jobs([words], multirun=True)
