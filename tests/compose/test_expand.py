"""Expansion of a sweep into the command lines of its jobs."""

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.compose import compose
from hqqtrain.compose.expand import expand_jobs


def expand(words: list[str], multirun: bool) -> list[list[str]]:
    return [line for line, _ in expand_jobs(words, multirun)]


def test_each_command_line_is_composed_once(monkeypatch):
    composed = []

    def counted(*arguments):
        composed.append(arguments)
        return hydra_compose(*arguments)

    hydra_compose = compose.hydra_compose
    monkeypatch.setattr(compose, "hydra_compose", counted)
    for words, multirun, jobs in ((["recipe=tiny_2bit"], False, 1), (["quant.nbits=2,3"], True, 2)):
        composed.clear()
        assert len(expand_jobs(words, multirun)) == jobs == len(composed)


def test_jobs_come_with_what_they_compose_to():
    jobs = expand_jobs(["recipe=sweep_bits", "quant.group_size=32"], multirun=False)
    assert [composed.quant.nbits for _, composed in jobs] == [4, 3, 2, 1]
    for words, composed in jobs:
        assert composed.checked() == compose.compose_config(words)


def test_a_command_without_sweep_is_returned_unchanged():
    words = ["recipe=tiny_2bit", "quant.nbits=3"]
    assert expand(words, multirun=False) == [words]
    assert expand(words, multirun=True) == [words]


def test_all_combinations_come_in_order():
    assert expand(["quant.nbits=2,3", "task=eval", "quant.group_size=32,null"], multirun=True) == [
        ["quant.nbits=2", "task=eval", "quant.group_size=32"],
        ["quant.nbits=2", "task=eval", "quant.group_size=null"],
        ["quant.nbits=3", "task=eval", "quant.group_size=32"],
        ["quant.nbits=3", "task=eval", "quant.group_size=null"],
    ]


def test_ranges_and_lists_as_values():
    assert expand(["quant.nbits=range(1,4)"], multirun=True) == [
        [f"quant.nbits={n}"] for n in (1, 2, 3)
    ]
    jobs = expand_jobs(["quant.skip=[lm_head],[lm_head,'*.o_proj']"], multirun=True)
    assert [composed.quant.skip for _, composed in jobs] == [
        ["lm_head"],
        ["lm_head", "*.o_proj"],
    ]


def test_a_sweep_over_recipes_includes_the_sweeps_of_the_recipes():
    jobs = expand(["recipe=tiny_2bit,sweep_bits"], multirun=True)
    assert jobs[0] == ["recipe=tiny_2bit"]
    assert jobs[1:] == [
        ["recipe=sweep_bits", f"quant.nbits={nbits}", f"quant.group_size={size}"]
        for nbits in (4, 3, 2, 1)
        for size in (32, 64, 128)
    ]


def test_a_key_on_the_command_line_is_not_swept():
    assert expand(["recipe=sweep_bits", "quant.nbits=3"], multirun=False) == [
        ["recipe=sweep_bits", "quant.nbits=3", f"quant.group_size={size}"] for size in (32, 64, 128)
    ]


def test_each_job_of_a_sweep_has_its_own_name():
    names = {
        composed.run_name() for _, composed in expand_jobs(["recipe=sweep_bits"], multirun=False)
    }
    assert len(names) == 12


def test_several_values_without_multirun_are_refused():
    with pytest.raises(UserError, match="a sweep needs -m"):
        expand(["quant.nbits=2,3"], multirun=False)


@pytest.mark.parametrize("words", ["quant.nbits=glob(*)", "optim.lr=interval(0,1)"])
def test_sweeps_without_a_list_of_values_are_refused(words):
    with pytest.raises(UserError, match="a sweep needs a list"):
        expand([words], multirun=True)
