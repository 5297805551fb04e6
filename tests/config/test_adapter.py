"""The keys of the adapter: names as in PEFT."""

import pytest

from hqqtrain.config.adapter import AdapterConfig


@pytest.mark.parametrize("names", ["all-linear", "q_proj", ["q_proj", "v_proj"], ["*"]])
def test_names_of_modules(names):
    assert list(AdapterConfig(target_modules=names).errors()) == []


@pytest.mark.parametrize("names", [None, "", [], [""], [" "], [3], {"q_proj": 1}])
def test_what_is_no_name_is_an_error_with_the_key(names):
    (message,) = AdapterConfig(target_modules=names).errors()
    assert message.startswith("adapter.target_modules=")
    assert "must be a list of names" in message
