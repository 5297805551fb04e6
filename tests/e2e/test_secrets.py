"""Secrets never reach a file: a real run with secrets in its environment and command line."""

from pathlib import Path

import pytest
import yaml
from runs import SMALL, Finished, launch

pytest.importorskip("wandb", reason="an optional tracker: absent on some machines")
from wandb_file import read_records, wandb_files

WORDS = [word for word in SMALL if not word.startswith(("track.", "train.max_steps"))]
SECRETS = {
    "key of W&B": "5ec4e7" + "0123456789abcdef" * 2 + "ab",
    "token of Hugging Face": "hf_PlantedTokenOfTheEnvironment",
    "password": "planted-password",
    "key on the command line": "sk-plantedOnTheCommandLine0",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Finished:
    key, token, password, other = SECRETS.values()
    folder = tmp_path_factory.mktemp("secrets")
    environment = {"WANDB_API_KEY": key, "HF_TOKEN": token, "HOME": str(folder / "home"),
                   "HTTPS_PROXY": f"http://me:{password}@127.0.0.1:9"}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        words = (*WORDS, "train.max_steps=2", "track.backends=[wandb,tensorboard]",
                 f"track.entity={other}", f"track.group='https://me:{password}@host/group'",
                 f"track.project={token}", "track.artifacts=true")  # fmt: skip
        return launch(*words, root=folder / "runs")


def files(folder: Path) -> dict[str, bytes]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_the_run_finishes_with_all_trackers(finished: Finished):
    assert finished.code == 0, finished.output
    names = files(finished.directory)
    assert any(name.startswith("tensorboard/events.") for name in names)
    assert any(name.endswith(".wandb") for name in names)


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_no_file_and_no_output_contains_a_secret(finished: Finished, secret: str):
    assert secret not in finished.output
    contents = files(finished.root.parent)
    assert [name for name, content in contents.items() if secret.encode() in content] == []
    (file,) = wandb_files(finished.directory)  # a block boundary may split a secret in the raw file
    assert not any(secret in str(record) for record in read_records(file))


def test_other_values_are_kept(finished: Finished):
    (file,) = wandb_files(finished.directory)
    words = {word for record in read_records(file) for word in record.environment.args}
    assert {"recipe=tiny_2bit", "track.entity=***", f"run.root={finished.root}"} <= words
    config = yaml.safe_load((finished.directory / "config.yaml").read_text())
    assert (config["track"]["entity"], config["track"]["artifacts"]) == ("***", True)


def test_the_last_lines_name_the_files_and_the_tracker_commands(finished: Finished):
    lines = finished.output.splitlines()
    assert any(line.startswith("training: 2/2 steps (100%), ") for line in lines)
    folder = finished.directory
    for name in ("quantized", "adapter", "summary.json", "metrics.jsonl", "report/index.html"):
        assert f"wrote {folder / name}" in lines
    assert f"TensorBoard: tensorboard --logdir {folder / 'tensorboard'}" in lines
    assert f"W&B: WANDB_RESUME=allow wandb sync {folder}/wandb/offline-run-*" in lines
