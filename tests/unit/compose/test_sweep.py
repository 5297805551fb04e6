"""Expansion of a sweep into the command lines of its jobs."""

import pytest

from hqqtrain.compose import compose, jobs
from hqqtrain.config import UserError


def test_a_command_without_sweep_is_returned_unchanged():
    words = ["recipe=tiny_2bit", "quant.nbits=3"]
    assert jobs(words, multirun=False) == [words]
    assert jobs(words, multirun=True) == [words]


def test_all_combinations_come_in_order():
    assert jobs(["quant.nbits=2,3", "task=eval", "quant.group_size=32,null"], multirun=True) == [
        ["quant.nbits=2", "task=eval", "quant.group_size=32"],
        ["quant.nbits=2", "task=eval", "quant.group_size=null"],
        ["quant.nbits=3", "task=eval", "quant.group_size=32"],
        ["quant.nbits=3", "task=eval", "quant.group_size=null"],
    ]


def test_ranges_and_lists_as_values():
    assert jobs(["quant.nbits=range(1,4)"], multirun=True) == [
        [f"quant.nbits={n}"] for n in (1, 2, 3)
    ]
    words = jobs(["quant.skip=[lm_head],[lm_head,'*.o_proj']"], multirun=True)
    assert [compose(job).quant.skip for job in words] == [["lm_head"], ["lm_head", "*.o_proj"]]


def test_a_sweep_over_recipes_includes_the_sweeps_of_the_recipes():
    found = jobs(["recipe=tiny_2bit,sweep_bits"], multirun=True)
    assert found[0] == ["recipe=tiny_2bit"]
    assert found[1:] == [
        ["recipe=sweep_bits", f"quant.nbits={nbits}", f"quant.group_size={size}"]
        for nbits in (4, 3, 2, 1)
        for size in (32, 64, 128)
    ]


def test_a_key_on_the_command_line_is_not_swept():
    assert jobs(["recipe=sweep_bits", "quant.nbits=3"], multirun=False) == [
        ["recipe=sweep_bits", "quant.nbits=3", f"quant.group_size={size}"] for size in (32, 64, 128)
    ]


def test_each_job_of_a_sweep_has_its_own_name():
    names = {compose(job).run_name() for job in jobs(["recipe=sweep_bits"], multirun=False)}
    assert len(names) == 12


def test_several_values_without_multirun_are_refused():
    with pytest.raises(UserError, match="a sweep needs -m"):
        jobs(["quant.nbits=2,3"], multirun=False)


@pytest.mark.parametrize("words", ["quant.nbits=glob(*)", "optim.lr=interval(0,1)"])
def test_sweeps_without_a_list_of_values_are_refused(words):
    with pytest.raises(UserError, match="a sweep needs a list"):
        jobs([words], multirun=True)
