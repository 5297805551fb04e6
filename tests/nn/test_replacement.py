"""Replaced attributes come back: their values, or their absence."""

from contextlib import ExitStack

import torch
from torch import nn

from hqqtrain.nn.replacement import replace_attribute, restore_attribute


def test_a_forward_that_is_replaced_twice_comes_back():
    layer, x = nn.Identity(), torch.ones(2)
    with ExitStack() as undo:
        replace_attribute(layer, "forward", lambda x: 2 * x, undo)
        replace_attribute(layer, "forward", lambda x: 3 * x, undo)
        assert layer(x)[0] == 3
    assert layer(x)[0] == 1
    assert "forward" not in vars(layer)


def test_a_value_that_something_else_sets_comes_back():
    layer = nn.Identity()
    with ExitStack() as undo:
        restore_attribute(layer, "training", undo)
        restore_attribute(layer, "other", undo)
        layer.eval()
        layer.other = 1
    assert layer.training
    assert not hasattr(layer, "other")


def test_without_a_stack_the_change_stays():
    layer = nn.Identity()
    replace_attribute(layer, "forward", lambda x: 2 * x, None)
    assert layer(torch.ones(1)) == 2
