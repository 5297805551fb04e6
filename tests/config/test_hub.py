"""The keys of the group hub."""

import pytest

from hqqtrain.config.hub import HubConfig, repository_name_error
from hqqtrain.config.run import RunConfig
from hqqtrain.config.unused import unused_settings


@pytest.mark.parametrize("name", ["alice/model", "a-1/b.c_d", "alice/" + 90 * "x", "_/x"])
def test_names_of_repositories(name):
    assert repository_name_error(name) is None
    assert list(HubConfig(push=name).errors()) == []


@pytest.mark.parametrize(
    "name",
    ["a/b/c", "alice/", "/model", "alice/a--b", "alice/a..b", "alice/x.git", "alice/a b",
     "alice/é", "alice/-x", "alice/x.", "alice/" + 91 * "x", "https://huggingface.co/alice/x"],
)  # fmt: skip
def test_other_names(name):
    assert "must be user/name" in repository_name_error(name)


def test_a_name_needs_its_owner():
    (error,) = HubConfig(push="model").errors()
    assert error == "hub.push=model: needs the user or organization, as in user/name."


def test_the_base_has_a_repository_of_its_own():
    assert HubConfig(push="alice/x").base_repository == "alice/x-base"
    assert HubConfig(push="alice/x", base="bob/y").base_repository == "bob/y"
    (error,) = HubConfig(push="alice/x", base="alice/x").errors()
    assert error.startswith("hub.base=alice/x: must not be the repository of hub.push")


def test_the_base_must_be_saved():
    config = RunConfig(hub=HubConfig(push="alice/x"))
    config.check()
    config.quant.save = False
    with pytest.raises(ValueError, match=r"^hub.push=alice/x: also pushes the base .*quant.save="):
        config.check()
    config.quant.nbits = None
    config.check()


def test_keys_without_effect():
    def unused(task: str, push: str | None) -> list[str]:
        hub = HubConfig(push=push, private=False, base="alice/b")
        given = ["hub.push", "hub.private", "hub.base"]
        return [m.partition(":")[0] for m in unused_settings(RunConfig(task=task, hub=hub), given)]

    assert unused("finetune", "alice/x") == []
    assert unused("quantize", "alice/x") == unused("export", "alice/x") == ["hub.base"]
    assert unused("finetune", None) == ["hub.private", "hub.base"]
    assert unused("eval", "alice/x") == ["hub.push", "hub.private", "hub.base"]


def test_what_is_pushed_does_not_define_the_result():
    assert RunConfig(hub=HubConfig(push="alice/x")).identity() == RunConfig().identity()
