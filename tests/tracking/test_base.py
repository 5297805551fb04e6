"""Trackers share flat names of metrics, and the errors that are logged per module."""

from hqqtrain.tracking.base import flatten, layer_errors


def test_nested_figures_get_dotted_names():
    summary = {"eval": {"final": {"kl": 0.1}, "tokens": 7}, "schema": 1, "empty": {}}
    assert flatten(summary) == {"eval.final.kl": 0.1, "eval.tokens": 7, "schema": 1}
    assert flatten({}) == {}


def test_no_flattened_name_equals_that_of_a_metric():
    assert flatten({"eval": {"loss": 1.0}, "eval/loss": 2.0}) == {
        "eval.loss": 1.0,
        "eval/loss": 2.0,
    }


def test_lists_and_null_are_values():
    assert flatten({"a": {"b": [1, {"c": 2}], "d": None}}) == {"a.b": [1, {"c": 2}], "a.d": None}


def test_errors_per_module_are_found_by_their_prefix():
    metrics = {
        "quant/relative_error/model.layers.0.mlp": 0.5,
        "quant/relative_error/head": 0.25,
        "train/loss": 1.0,
        "quant/relative_errors": 9.0,
    }
    assert layer_errors(metrics) == {"model.layers.0.mlp": 0.5, "head": 0.25}
    assert layer_errors({}) == {}
