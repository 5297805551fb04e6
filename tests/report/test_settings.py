"""The settings of a run are shown as the command line takes them, hyper-parameters first."""

from hqqtrain.report.settings import render_settings


def test_groups_are_in_the_order_of_the_hyperparameters():
    config = {"run": {"name": "mine"}, "optim": {"lr": 1e-4}, "quant": {"nbits": 2, "save": True}}
    page = render_settings(config)
    places = [page.index(word) for word in ("nbits", "save", "lr", "Other settings", "mine")]
    assert places == sorted(places)
    assert ">true<" in page
    assert ">0.0001<" in page


def test_what_is_not_set_is_left_out():
    page = render_settings({"adapter": {"r": 8, "init_from": None, "target_modules": []}})
    assert "init_from" not in page
    assert "target_modules" not in page


def test_the_command_is_quoted_for_a_shell():
    page = render_settings({"quant": {"nbits": 2}, "command": ["hqqtrain", "run.name=a b"]})
    assert "hqqtrain &#x27;run.name=a b&#x27;" in page


def test_no_settings_give_no_section():
    assert render_settings({}) == render_settings({"command": ["x"]}) == ""
