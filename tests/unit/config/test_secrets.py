"""Secrets never reach a file; what makes a run reproducible stays."""

import pytest

from hqqtrain.config.secrets import masked, masked_command

HF, WANDB, COMMIT = "hf_" + "aB3" * 11, "0123456789abcdef" * 2 + "01234567", "e" * 40


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([f"hub.token={HF}"], ["hub.token=***"]),
        (["model.hf_token=short"], ["model.hf_token=***"]),
        (["--api-key", "mine", "x"], ["--api-key", "***", "x"]),
        (["--password=p=q"], ["--password=***"]),
        ([f"WANDB={WANDB}"], ["WANDB=***"]),
        ([HF], ["***"]),
        (["data.source=https://me:pw@host/x"], ["data.source=https://***@host/x"]),
    ],
)
def test_secrets_on_the_command_line_are_masked(words, shown):
    assert masked_command(words) == shown


def test_the_rest_of_the_command_line_stays():
    words = ["hqqtrain", "-m", "recipe=tiny_2bit", "quant.nbits=2,3", "eval.tokens=65536",
             "track.project=token-study", f"model.revision={COMMIT}"]  # fmt: skip
    assert masked_command(words) == words


def test_configurations():
    config = {"track": {"api_key": "x", "project": "p"}, "eval": {"tokens": 5, "token": ""},
              "model": {"revision": COMMIT, "list": [HF, 3, None]}}  # fmt: skip
    assert masked(config) == {"track": {"api_key": "***", "project": "p"},
                              "eval": {"tokens": 5, "token": ""},
                              "model": {"revision": COMMIT, "list": ["***", 3, None]}}  # fmt: skip


def test_a_fingerprint_is_no_secret():
    fingerprint = "sha256:" + "0f" * 32
    assert masked(fingerprint) == fingerprint
