"""Records what tests/kernels/compiled.py prints, while the sources of the kernels stay the same.

    python tests/helpers/compiled_record.py

Compiling for all GPUs takes 110 seconds of CPU time. So the results are in a file, with a digest of
the sources that they follow from. Where a source differs, the tests compile everything again.
"""

import hashlib
import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hqqtrain_kernels

CAPABILITIES = (90, 80, 86, 100)
PROGRAM = Path(__file__).parents[1] / "kernels" / "compiled.py"
RECORD = PROGRAM.with_suffix(".json")


def source_digest() -> str:
    """Return the sha256 of all that the machine code follows from: sources, cases and Triton."""
    kernels = Path(hqqtrain_kernels.__file__).parent
    digest = hashlib.sha256(version("triton").encode())
    for file in [*sorted(kernels.glob("*.py")), PROGRAM]:
        digest.update(f"{file.name} {file.stat().st_size} ".encode() + file.read_bytes())
    return digest.hexdigest()


def recorded(capability: int) -> list[dict[str, Any]]:
    """Return the recorded kernels for a GPU; none if a source has changed since."""
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    if record.get("digest") != source_digest():
        return []
    return [one for one in record["compiled"] if one["capability"] == capability]


def compile_for(capability: int, *cases: str, cache: Path | None = None) -> list[dict[str, Any]]:
    """Run `compiled.py`, in its own process, because tests enable Triton's interpreter.

    Args:
        capability: The compute capability of the GPU, such as 90.
        cases: Words of the names of the cases to compile; none: all.
        cache: A folder for Triton's cache, in place of the user's.
    """
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    env |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    command = [sys.executable, str(PROGRAM), str(capability), *cases]
    process = subprocess.run(command, capture_output=True, text=True, env=env)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def main() -> None:
    """Compile for all GPUs and write the record."""
    rows = [json.dumps(one) for each in CAPABILITIES for one in compile_for(each)]
    RECORD.write_text(
        f'{{"digest": "{source_digest()}", "triton": "{version("triton")}", "compiled": [\n'
        + ",\n".join(rows) + "\n]}\n"
    )  # fmt: skip


if __name__ == "__main__":
    main()
