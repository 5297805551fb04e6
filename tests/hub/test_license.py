"""The license of a base comes from its own card, here or on the Hub."""

import pytest
from huggingface_hub import HfApi, ModelCardData
from huggingface_hub.errors import HTTPError

from hqqtrain.hub.license import license_of

CARD = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: en\n---\n"
LICENSE = {"license": "other", "license_name": "llama3", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CARD, LICENSE),
        ("---\nlicense: apache-2.0\n---\n", {"license": "apache-2.0"}),
        ("---\nlicense: unknown\n---\n", {}),
        ("---\nlicense: [a, b]\n---\n", {}),
        ("no metadata", {}),
        ("---\n- 1\n---\n", {}),
    ],
)
def test_the_card_in_a_folder(tmp_path, text, expected):
    (tmp_path / "README.md").write_text(text)
    assert license_of(tmp_path, None) == expected


def test_the_card_on_the_hub(tmp_path, monkeypatch):
    def info(self, name):
        if name == "gone":
            raise HTTPError("unreachable")
        data = None if name == "none" else ModelCardData(license="mit")
        return type("Info", (), {"card_data": data})

    monkeypatch.setattr(HfApi, "model_info", info)
    assert license_of(None, "owner/name") == {"license": "mit"}
    assert license_of(tmp_path, "owner/name") == {"license": "mit"}
    assert license_of(None, "gone") == license_of(None, "none") == license_of(tmp_path, None) == {}
