"""Secrets are masked; values that make a run reproducible are kept."""

import pytest

from hqqtrain.common.secrets import mask_command, mask_secrets

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
        (["data.source=https://me:p@ss@host/x"], ["data.source=https://***@host/x"]),
        (["data.source='s3://b/x?X-Amz-Signature=abc&n=1'"], ["data.source='s3://b/x?***&n=1'"]),
        (
            ["data.source=https://h/x.jsonl?n=1&access_token=abc#top"],
            ["data.source=https://h/x.jsonl?n=1&***#top"],
        ),
        (["run.root=me:pw@host:/runs"], ["run.root=***@host:/runs"]),
        (["run.root=sftp://me:pw@host/runs"], ["run.root=sftp://***@host/runs"]),
        ([f"track.entity={HF}"], ["track.entity=***"]),
        (["track.project=sk-proj-abcd-efghijkl-1"], ["track.project=***"]),
        ([f"model.revision={HF}"], ["model.revision=***"]),
        ([f"data.text_field=github_pat_{'0123456789_' * 4}"], ["data.text_field=***"]),
        (["x.secret_access_key=abc/def"], ["x.secret_access_key=***"]),
        (["x=Bearer abc.def"], ["x=Bearer ***"]),
        ([f"a=x/ghp_{'a1B2' * 9}"], ["a=x/***"]),
        ([f"a=sk-{'0123456789abcdef' * 2}"], ["a=***"]),
        (["a=glpat-abcdefghijklmnopqrst"], ["a=***"]),
        (["a=xoxb-123456789012-abcdef"], ["a=***"]),
        (["a=AKIAIOSFODNN7EXAMPLE"], ["a=***"]),
        ([f"a=wandb_v1_{'aB3' * 11}"], ["a=***"]),
        (["export MY_PASSWORD=mine and='more'"], ["export MY_PASSWORD=***"]),
        (["MY_PASSWORD+=mine", "MY_TOKEN[0]=mine"], ["MY_PASSWORD+=***", "MY_TOKEN[0]=***"]),
        (
            ["launch.setup=[cd x; export HF_TOKEN='a b' X=1]"],
            ["launch.setup=[cd x; export HF_TOKEN=*** X=1]"],
        ),
        (["--export=ALL,MY_API_KEY=abc,X=1"], ["--export=ALL,MY_API_KEY=***,X=1"]),
        (["eyJhbGciOiJIUzI1.eyJzdWIiOiIxMjM0.c2lnbmF0dXJl"], ["***"]),
    ],
)
def test_secrets_on_the_command_line_are_masked(words, shown):
    assert mask_command(words) == shown


@pytest.mark.parametrize("before", ["export ", "cd x;", "cd x&&", "--export=ALL,"])
@pytest.mark.parametrize(
    "value",
    [
        '"$X"pw', "$(cat file)pw", "${X:-a pw}", "$(f $(g (h)))pw", "`cat file`pw", "'a b'\"c pw\"",
        "a\\ pw", "a,pw", "a#pw", '"a\\" pw"', 'a" pw"', '"not closed pw',
    ],
)  # fmt: skip
def test_an_assigned_value_is_masked_to_the_end_of_the_shell_word(before, value):
    masked = mask_secrets(f"{before}MY_PASSWORD={value}")
    assert masked.startswith(before)
    assert masked.endswith("***")
    assert mask_secrets(f"{before}MY_PASSWORD=pw; cd y") == mask_secrets(
        f"{before}MY_PASSWORD=another; cd y"
    )


def test_what_follows_an_assignment_is_kept():
    assert mask_secrets("MY_TOKEN='a b' make; cd x") == "MY_TOKEN=*** make; cd x"
    assert mask_secrets('MY_TOKEN="a\\"b"&&cd x') == "MY_TOKEN=***&&cd x"


def test_ordinary_words_of_the_command_line_are_kept():
    words = [
        "hqqtrain",
        "-m",
        "recipe=tiny_2bit",
        "quant.nbits=2,3",
        "eval.tokens=65536",
        "track.project=token-study",
        f"model.revision={COMMIT}",
        "data.source=a:b/c.txt",
        "data.source=https://host/key/x?page=2",
        "run.root=/data/me@work/disk-sk/runs",
        "quant.overrides={model.layers.*.q_proj:{nbits:4}}",
        "run.time_limit=1-02:30:00",
        f"model.name_or_path=/hub/snapshots/{COMMIT}",
        "data.source=/data/sk-learning-text",
        "data.source=/scratch/hf_checkpoints/llama",
        "run.root=/x/ghp_of_mine/GHS_12345678",
    ]
    assert mask_command(words) == words


def test_words_that_resemble_keys_are_not_masked():
    """Our own messages contain words that resemble keys, in another case or shorter."""
    advice = (
        "set HF_HUB_OFFLINE=1 or HF_HUB_ENABLE_HF_TRANSFER, track.project=SK-something-of-mine, "
        "HF_ABCDEFGHIJKLMNOPQRSTUVWXYZABCDEFGHIJ, xoxo-kisses-and-hugs, eval.tokens=65536"
    )
    assert mask_secrets(advice) == advice


def test_nested_configurations_are_masked():
    config = {"track": {"api_key": "x", "project": "p"}, "eval": {"tokens": 5, "token": ""},
              "model": {"revision": COMMIT, "list": [HF, 3, None]}}  # fmt: skip
    assert mask_secrets(config) == {"track": {"api_key": "***", "project": "p"},
                              "eval": {"tokens": 5, "token": ""},
                              "model": {"revision": COMMIT, "list": ["***", 3, None]}}  # fmt: skip


def test_a_fingerprint_is_not_a_secret():
    fingerprint = "sha256:" + "0f" * 32
    assert mask_secrets(fingerprint) == fingerprint


def test_secrets_from_the_environment_are_masked_everywhere(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", COMMIT)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "no known/form at all")
    monkeypatch.setenv("MY_TOKEN", "short")
    config = {"track": {"group": "x-no known/form at all-y"}, "model": {"revision": COMMIT}}
    assert mask_secrets(config) == {"track": {"group": "x-***-y"}, "model": {"revision": "***"}}
    assert mask_command([f"a={COMMIT}", f"{COMMIT}=1", "short"]) == ["a=***", "***=1", "short"]


@pytest.mark.parametrize("name", ["PWD", "OLDPWD"])
def test_the_working_directory_is_not_a_password(name, monkeypatch):
    monkeypatch.setenv(name, "/long/gone/folder")
    assert mask_secrets({"run": {"root": "/long/gone/folder/runs"}}) == {
        "run": {"root": "/long/gone/folder/runs"}
    }


def test_the_path_of_a_secret_file_is_not_a_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    monkeypatch.setenv("MY_SHELLS_PWD", str(tmp_path))
    monkeypatch.setenv("MYSQL_PWD", "/no-such-path")
    assert mask_command([f"run.root={tmp_path}/runs"]) == [f"run.root={tmp_path}/runs"]
    assert mask_secrets("x /no-such-path") == "x ***"


@pytest.mark.parametrize("value", [12345678, 1.5, ["a", "b"], {"user": "me", "key": "x"}])
def test_values_of_secret_keys_are_masked_whatever_their_type(value):
    assert mask_secrets({"x": {"password": value, "credentials": value}}) == {
        "x": {"password": "***", "credentials": "***"}
    }


def test_masking_twice_changes_nothing():
    text = f"https://me:pw@host/x?token=abc {HF} me:pw@host {WANDB} bearer abc"
    assert mask_secrets(mask_secrets(text)) == mask_secrets(text)
    assert "pw" not in mask_secrets(text)
    assert "abc" not in mask_secrets(text)
