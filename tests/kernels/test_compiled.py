"""No kernel spills registers, on any GPU that we support, whether or not this machine has one."""

import ast
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest
from compiled_record import CAPABILITIES, compile_for, recorded
from packaging.version import Version

import hqqtrain_kernels

pytest.importorskip("triton", reason="Triton is not installed here")
KERNELS = Path(hqqtrain_kernels.__file__).parent
SPILLS = "spills"
TOLERATED_BYTES = 16 if Version(version("triton")) < Version("3.9") else 0
"""Bytes that a kernel may spill. Triton 3.6 spills 16 in one of them, `_skinny_gemm_kernel` for 3
bits and M=16 on sm_80 and sm_86, and Triton 3.9 spills none."""


FEW = (SPILLS, "dequantize", "M=16")
"""Cases that are compiled in every run, whatever is recorded."""


def spill_messages(compiled: list[dict]) -> list[str]:
    return [
        f"{one['case']}: {one['kernel']} spills {one['stack']} bytes on sm_{one['capability']}"
        for one in compiled
        if one["stack"] > TOLERATED_BYTES
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


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_no_kernel_spills(capability: int, tmp_path: Path) -> None:
    if not ptxas_supports(capability):
        pytest.skip(f"Triton's ptxas does not know sm_{capability}")
    compiled = recorded(capability) or compile_for(capability, cache=tmp_path)
    ours = [one for one in compiled if one["case"] != SPILLS]
    assert spill_messages(ours) == []
    assert {one["kernel"] for one in ours} == launched_kernels()
    # One kernel is made to spill, which proves that the check works.
    (message,) = spill_messages([one for one in compiled if one["case"] == SPILLS])
    assert message.startswith(f"spills: spills spills {compiled[0]['stack']} bytes on sm_")


def test_the_record_has_what_is_compiled_now(tmp_path: Path) -> None:
    if not recorded(80):
        pytest.skip("a source has changed since the record was made")
    compiled = compile_for(80, *FEW, cache=tmp_path)
    assert len({one["kernel"] for one in compiled}) > 2
    assert all(one in recorded(80) for one in compiled)


def test_a_change_of_a_source_makes_the_record_useless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compiled_record.version", lambda name: "0")
    assert recorded(90) == []
