"""Compare the behavior of two source trees by the files that their runs leave.

    python scripts/compare_trees.py record /tmp/old --tree ../old
    python scripts/compare_trees.py record /tmp/new
    python scripts/compare_trees.py compare /tmp/old /tmp/new

`record` runs the commands of compare_trees_cases.py on the CPU with the package of a tree, and
writes one JSON file per case: exit codes, every tensor's bits, losses, gradient norms, learning
rates, metrics and file names. `compare` lists the differences. The script knows the package only as
`python -m hqqtrain`, so it still works after files are moved and symbols are renamed.

Commands of one process run in a fork of this process, which has imported torch and transformers
before: a start takes a third of a second that way, and ten seconds otherwise.
"""

import argparse
import csv
import fnmatch
import hashlib
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare_trees_cases import Case, Command, all_cases, translate, usage_of, write_inputs

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "WANDB_MODE": "offline",
    "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "10000",
}  # fmt: skip
PRELOADED = ("torch", "transformers", "peft", "accelerate", "datasets", "bitsandbytes")
TIMEOUT = 600
"""Seconds that one command may take."""

UNSTABLE = re.compile(
    r"time|.*seconds|.*(tokens|gb)_per_second|memory/.*|.*peak.*gib|.*versions?|git_revision"
    r"|pid|cause|slurm_job|command|folder|wandb_run_id"
)
"""Keys of JSON objects and columns of tables that depend on time, memory, versions or wording."""
NAMES_ONLY = re.compile(r"config\.yaml|.*\.(md|html|png|log)|\.lock|.*\.lock")
"""Files whose name alone is recorded, because they contain text, times, paths or config keys."""
HASHED = re.compile(r"(?!step-)(.*-)?[0-9a-f]{8,}")
"""Folders named by a hash of the configuration, which a renamed key changes; not checkpoints."""


def main() -> int:
    """Record or compare; return 1 if a comparison finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    record_parser = actions.add_parser("record", help="run all cases and write OUT/<case>.json")
    record_parser.add_argument("out", type=Path)
    record_parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    record_parser.add_argument("--only", action="append", metavar="NAME", help="name or glob")
    compare_parser = actions.add_parser("compare", help="compare two recordings")
    compare_parser.add_argument("first", type=Path)
    compare_parser.add_argument("second", type=Path)
    options = parser.parse_args()
    if options.action == "compare":
        return compare(options.first, options.second)
    return record(options.out, options.tree.resolve(), options.only or ["*"])


def record(out: Path, tree: Path, patterns: list[str]) -> int:
    """Run the cases whose names match and write what they left."""
    cases = [case for case in all_cases() if any(fnmatch.fnmatch(case.name, p) for p in patterns)]
    if not cases:
        names = ", ".join(case.name for case in all_cases())
        sys.exit(f"--only {' '.join(patterns)}: no such case; there are {names}")
    out.mkdir(parents=True, exist_ok=True)
    packages = [str(tree), str(tree / "kernels")]
    os.environ.update(ENVIRONMENT, PYTHONPATH=os.pathsep.join(packages))
    if (tree / "recipes").is_dir():
        os.environ["HQQTRAIN_RECIPES"] = str(tree / "recipes")
    usage = usage_of(tree)
    for module in PRELOADED:
        __import__(module)
    sys.path[:0] = packages
    for case in cases:
        began = time.monotonic()
        observed = run_case(case, tree, usage, out / f"{case.name}.log")
        text = json.dumps(observed, indent=1, sort_keys=True)
        (out / f"{case.name}.json").write_text(text + "\n")
        print(f"{time.monotonic() - began:5.1f} s  {observed['codes']}  {case.name}", flush=True)
    return 0


def run_case(case: Case, tree: Path, usage: str, log: Path) -> dict[str, Any]:
    """Run the commands of a case in a new folder and return what is compared."""
    codes = []
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="compare-trees-") as folder:
        write_inputs(Path(folder), tree)
        for command in case.commands:
            codes.append(_run(command, translate(command.words, usage), Path(folder), log))
        left = {name: observe(Path(folder) / name) for name in ("runs", "cache")}
    return {"commands": [command.words for command in case.commands], "codes": codes, **left}


def _run(command: Command, words: list[str], folder: Path, log: Path) -> int:
    """Run one command, append its output to `log`, and return its exit code."""
    with log.open("a") as output:
        output.write(f"$ python -m hqqtrain {' '.join(words)}\n")
        output.flush()
        if command.ranks > 1:
            launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node"]
            line = [sys.executable, "-m", *launcher, str(command.ranks), "-m", "hqqtrain", *words]
            return subprocess.run(
                line, cwd=folder, stdout=output, stderr=output, timeout=TIMEOUT
            ).returncode
        pid = os.fork()
        if pid == 0:
            _become(words, folder, output.fileno())
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def _become(words: list[str], folder: Path, output: int) -> None:
    """In a forked process: do what `python -m hqqtrain WORDS` does, and exit."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(folder)
        signal.alarm(TIMEOUT)
        sys.argv = ["hqqtrain", *words]
        runpy.run_module("hqqtrain", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def observe(path: Path) -> Any:
    """Return what is compared of a file or, by name, of everything in a folder.

    Folders named by a hash become a list under `<hashed>`, sorted by what they hold.
    """
    if not path.is_dir():
        return _observe_file(path) if path.exists() else None
    children: dict[str, Any] = {}
    hashed = []
    for child in sorted(path.iterdir()):
        if child.is_dir() and HASHED.fullmatch(child.name):
            hashed.append(observe(child))
        elif HASHED.fullmatch(child.stem) and child.suffix in (".lock", ".log"):
            continue
        else:
            children[child.name] = observe(child)
    if hashed:
        children["<hashed>"] = sorted(hashed, key=lambda value: json.dumps(value, sort_keys=True))
    return children


def _observe_file(path: Path) -> Any:
    if NAMES_ONLY.fullmatch(path.name):
        return "present"
    if path.suffix == ".safetensors":
        return read_tensors(path)
    if path.name == "manifest.json":
        # The checksums cover versions, times and the metadata of safetensors, whose order varies.
        return sorted(json.loads(path.read_text())["files"])
    if path.name == "made_from.json":  # digests of the sizes and times of the source's files
        return sorted(json.loads(path.read_text()))
    if path.suffix == ".jsonl":
        return [stable(json.loads(line)) for line in path.read_text().splitlines()]
    if path.suffix == ".json" and path.name != "tokenizer.json":
        return stable(json.loads(path.read_text()))
    if path.suffix == ".csv":
        with path.open(newline="") as lines:
            return [stable(row) for row in csv.DictReader(lines)]
    return hashlib.sha256(path.read_bytes()).hexdigest()


def stable(value: Any) -> Any:
    """Return a JSON value without keys that are UNSTABLE; floats and strings stay as they are."""
    if isinstance(value, dict):
        return {k: stable(v) for k, v in value.items() if not UNSTABLE.fullmatch(k)}
    if isinstance(value, list):
        return [stable(item) for item in value]
    if isinstance(value, str) and HASHED.fullmatch(value) and len(value) < 64:
        return "<hashed>"
    return value


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the metadata of a safetensors file, and of each tensor dtype, shape and sha256."""
    content = memoryview(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(bytes(content[8:start]))
    result: dict[str, Any] = {"metadata": header.pop("__metadata__", {})}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        digest = hashlib.sha256(content[start + begin : start + end]).hexdigest()
        result[name] = f"{tensor['dtype']} {tensor['shape']} {digest}"
    return result


def compare(first: Path, second: Path, max_lines: int = 6) -> int:
    """Print whether each case is equal, with at most `max_lines` differences.

    Return 1 if any case differs, otherwise 0.
    """
    names = sorted({file.stem for folder in (first, second) for file in folder.glob("*.json")})
    different = 0
    for name in names:
        files = [folder / f"{name}.json" for folder in (first, second)]
        absent = [str(file.parent) for file in files if not file.exists()]
        lines = [f"not recorded in {absent[0]}"] if absent else []
        lines = lines or list(differences(*(json.loads(file.read_text()) for file in files)))
        different += bool(lines)
        print(f"{'DIFFERENT' if lines else 'equal    '}  {name}")
        for line in lines[:max_lines]:
            print(f"    {line}")
        if len(lines) > max_lines:
            print(f"    and {len(lines) - max_lines} more")
    print(f"{len(names) - different} of {len(names)} cases are equal")
    return 1 if different or not names else 0


def differences(first: Any, second: Any, path: str = "") -> Iterator[str]:
    """Yield a line for every place where two JSON values differ. NaN equals NaN."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in sorted(first.keys() | second.keys()):
            where = f"{path} > {key}" if path else key
            if key in first and key in second:
                yield from differences(first[key], second[key], where)
            else:
                yield f"{where}: only in the {'first' if key in first else 'second'}"
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}[{index}]")
    elif json.dumps(first) != json.dumps(second):
        yield f"{path}: {json.dumps(first)[:120]} != {json.dumps(second)[:120]}"


if __name__ == "__main__":
    sys.exit(main())
