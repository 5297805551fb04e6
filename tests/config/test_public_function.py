"""A wrong call of a public function names the argument, and the one that was meant."""

from typing import Any

import pytest

from hqqtrain.common.errors import UserError
from hqqtrain.config.public_function import public_function


@public_function(model=int, data=(list, str))
def sample(model, data=None, *, lr=1.0, micro_batch_size=1):
    return model, data, lr, micro_batch_size


@public_function()
def open_ended(model, **settings):
    return model, settings


@pytest.mark.parametrize(("args", "keywords", "message"), [
    ((1,), {"learning_rate": 1}, "learning_rate is no argument. Did you mean lr?"),
    ((1,), {"per_device_train_batch_size": 1}, "Did you mean micro_batch_size?"),
    ((1,), {"dat": 1}, "dat is no argument. Did you mean data?"),
    ((1,), {"gamma": 1}, "gamma is no argument. Arguments are model, data, lr, micro_batch_size."),
    (("./folder",), {}, "model is a str; it must be a module of PyTorch."),
    ((1, 2), {}, "data is a int; it must be the result of load_data."),
    ((1,), {"data": 2}, "data is a int"),
])  # fmt: skip
def test_a_wrong_call(args: tuple, keywords: dict[str, Any], message: str):
    with pytest.raises(UserError, match=r"^sample: ") as caught:
        sample(*args, **keywords)
    assert message in str(caught.value)


def test_right_calls():
    assert sample(1) == sample(1, None) == (1, None, 1.0, 1)
    assert sample(1, "x", lr=2.0) == sample(model=1, data="x", lr=2.0)
    assert open_ended(1, learning_rate=2) == (1, {"learning_rate": 2})


def test_missing_arguments_are_those_of_python():
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        sample()
