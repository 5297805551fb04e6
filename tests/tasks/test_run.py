"""The process is prepared before torch, transformers and bitsandbytes are imported."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hqqtrain.tasks.run import _no_garbage_collection

ROOT = Path(__file__).parents[2]

PROGRAM = """
import sys
from hqqtrain.tasks.run import _prepare_imports
_prepare_imports()
import importlib.util, logging
print(importlib.util.find_spec("kernels") is not None)
logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: no reason")
logger.warning("another message")
"""


@pytest.mark.parametrize(
    ("consent", "is_found"),
    [(None, False), ("NO", False), ("0", False), ("yes", True), ("1", True)],
)
def test_the_package_for_kernels_of_the_hub_is_hidden_without_consent(tmp_path, consent, is_found):
    """transformers and bitsandbytes would import it, and it would download code and run it."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    variables = {k: v for k, v in os.environ.items() if k != "USE_HUB_KERNELS"}
    if consent is not None:
        variables["USE_HUB_KERNELS"] = consent
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=variables | {"PYTHONPATH": path},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == f"{is_found}\n"
    assert ("gemm_4bit_forward" in done.stderr) == is_found
    assert "another message" in done.stderr


def test_garbage_is_not_collected_during_imports_and_imported_objects_never(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    frozen = gc.get_freeze_count()
    with _no_garbage_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > frozen


@pytest.mark.e2e
def test_a_check_in_a_clone_says_nothing_about_the_folder_kernels(tmp_path):
    (tmp_path / "mine.txt").write_text("def f(x): return x")
    done = subprocess.run(
        [sys.executable, "-m", "hqqtrain", "--check", "recipe=tiny_2bit", "run.root=there",
         f"data.source={tmp_path / 'mine.txt'}", "eval.source=null"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
