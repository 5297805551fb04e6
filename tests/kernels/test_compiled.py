"""No kernel spills registers, on any GPU that we support, whether or not this machine has one."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hqqtrain_kernels

pytest.importorskip("triton", reason="Triton is not installed here")
PROGRAM = Path(__file__).with_name("compiled.py")
KERNELS = Path(hqqtrain_kernels.__file__).parent
SPILLS = "spills"


def compile_for(capability: int, folder: Path) -> list[dict]:
    """Run `compiled.py`, in its own process, because Triton's interpreter is enabled in ours."""
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, PROGRAM, str(capability)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
    )
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def spill_messages(compiled: list[dict]) -> list[str]:
    return [
        f"{one['case']}: {one['kernel']} spills {one['stack']} bytes on sm_{one['capability']}"
        for one in compiled
        if one["stack"]
    ]


def launched_kernels() -> set[str]:
    """Return the @triton.jit functions that no other @triton.jit function calls."""
    jitted = [
        node
        for file in KERNELS.glob("*_triton.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and any(map(_is_jit, node.decorator_list))
    ]
    names = (name for node in jitted for name in ast.walk(node) if isinstance(name, ast.Name))
    return {node.name for node in jitted} - {name.id for name in names}


def _is_jit(decorator: ast.expr) -> bool:
    return ast.unparse(decorator).startswith("triton.jit")


def ptxas_supports(capability: int) -> bool:
    """Whether an assembler that comes with Triton supports this GPU."""
    import triton

    tools = (Path(triton.__file__).parent / "backends" / "nvidia" / "bin").glob("ptxas*")
    helps = (subprocess.run([tool, "--help"], capture_output=True, text=True) for tool in tools)
    return any(f"sm_{capability}" in one.stdout for one in helps)


@pytest.mark.parametrize("capability", [90, 80, 86, 100])
def test_no_kernel_spills(capability: int, tmp_path: Path) -> None:
    if not ptxas_supports(capability):
        pytest.skip(f"Triton's ptxas does not know sm_{capability}")
    compiled = compile_for(capability, tmp_path)
    ours = [one for one in compiled if one["case"] != SPILLS]
    assert spill_messages(ours) == []
    assert {one["kernel"] for one in ours} == launched_kernels()
    # One kernel is made to spill, which proves that the check works.
    (message,) = spill_messages([one for one in compiled if one["case"] == SPILLS])
    assert message.startswith(f"spills: spills spills {compiled[0]['stack']} bytes on sm_")
