"""Make virtual environments with other programs, for the tests that load our exports with them.

    python scripts/interop_environments.py environments
    HQQTRAIN_INTEROP=environments pytest -m interop tests/interop

Each program has an environment of its own, because their dependencies contradict each other and
ours. The versions are those that the exports were tested with. An environment that exists is kept.
"""

import argparse
import subprocess
import sys
import venv
from pathlib import Path

TORCH = "torch==2.13.0"

ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "mlx": (("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2", "numpy"),),
    "hqq": ((TORCH,), ("transformers==4.57.6", "hqq==0.2.8.post1", "accelerate", "numpy")),
    "compressed": ((TORCH,), ("transformers==5.17.0", "compressed-tensors==0.17.0", "accelerate")),
    "llamacpp": (("xllamacpp==2026.10.11549", "numpy"),),
}
"""Name -> packages to install together, in this order. torch comes first, with its CPU build."""


def make_environment(folder: Path, steps: tuple[tuple[str, ...], ...]) -> Path:
    """Create a virtual environment with packages, and return its interpreter."""
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        venv.create(folder, with_pip=True, clear=True)
        for packages in steps:
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        (folder / "complete").touch()
    return python


def main(arguments: list[str]) -> int:
    """Make the environments that the command line names; all by default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="the folder to create them in")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(ENVIRONMENTS)}")
    options = parser.parse_args(arguments)
    unknown = set(options.names) - ENVIRONMENTS.keys()
    if unknown:
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(ENVIRONMENTS)}")
    for name in options.names or ENVIRONMENTS:
        print(f"{name}: {make_environment(options.folder / name, ENVIRONMENTS[name])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
