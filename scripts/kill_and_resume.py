"""Show that a run which is killed many times ends with the bits of an uninterrupted run.

    python scripts/kill_and_resume.py --ranks 2 --kills 30 --root /tmp/killed

The script trains the tiny model once without interruption. It then trains the model a second time:
it kills that run with SIGKILL at a random moment, every other time while a checkpoint is written,
and starts it again with the same command, until the run was killed `--kills` times and has
finished. Each start saves only a few checkpoints before it is killed. Adapter, optimizer state and
the loss of every step must agree bit for bit. On a CPU, each kill takes about 15 seconds.
"""

import argparse
import contextlib
import inspect
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file

from hqqtrain.tracking.jsonl import read_metrics

RECIPE = (
    "recipe=tiny_2bit", "run.name=run", "train.global_batch_size=4", "train.micro_batch_size=2",
    "train.max_seq_len=64", "train.precision=fp32", "adapter.dropout=0.05", "eval.tokens=512",
    "eval.every=20", "eval.samples=0", "ckpt.every=3", "track.backends=[]",
)  # fmt: skip

SAVES = 4
"""Checkpoints that a start may save before it is killed, so that --steps suffice on any machine."""
STEPS = 15
"""Default number of steps per kill: more than the steps between SAVES checkpoints."""


def main() -> int:
    """Run once uninterrupted and once with kills; return 0 if the results agree, otherwise 1."""
    options = _options()
    rng = random.Random(options.seed)
    steps = options.steps or STEPS * (options.kills + 2)
    arguments = [*RECIPE, f"train.max_steps={steps}", *_write_texts(options.root)]
    uninterrupted, killed = options.root / "whole", options.root / "killed"
    began = time.monotonic()
    processes = _start([*arguments, f"run.root={uninterrupted}"], options.ranks, uninterrupted)
    assert _wait(processes) == 0, f"the run failed: see {uninterrupted}/output-*.txt"
    seconds = time.monotonic() - began
    print(f"uninterrupted: {steps} steps on {options.ranks} ranks, {seconds:.0f} s", flush=True)
    kills = 0
    while True:
        before = _half_written(killed / "run")
        processes = _start([*arguments, f"run.root={killed}"], options.ranks, killed)
        if kills < options.kills:
            while_saving = kills % 2 == 1
            patience = rng.uniform(0, options.patience)
            if _kill(processes, killed / "run", while_saving, patience, rng, before):
                kills += 1
                print(f"kill {kills}: {_describe(killed / 'run', while_saving)}", flush=True)
                continue
        code = _wait(processes)
        break
    print(f"killed {kills} times; the last start exited with {code}", flush=True)
    if kills < options.kills:
        print(f"the run finished before {options.kills} kills; increase --steps")
        return 1
    return _compare(uninterrupted / "run", killed / "run")


def _write_texts(root: Path) -> list[str]:
    """Write two small texts and return the arguments that use them.

    A start with the whole standard library would take seconds longer.
    """
    root.mkdir(parents=True, exist_ok=True)
    arguments = []
    for key, module in (("data", argparse), ("eval", random)):
        (root / f"{key}.txt").write_text(inspect.getsource(module))
        arguments.append(f"{key}.source={root / key}.txt")
    return arguments


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help=f"steps of the run; default: {STEPS} per kill")
    parser.add_argument(
        "--patience", type=float, default=20, help="upper limit of the seconds until a kill"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--root", type=Path, required=True, help="a new folder")
    return parser.parse_args()


def _start(arguments: list[str], ranks: int, root: Path) -> list[subprocess.Popen]:
    """Start one process per rank, as a launcher does; append their output to files in `root`."""
    root.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(ranks):
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
            env |= {
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
            }
        with (root / f"output-{rank}.txt").open("a") as output:
            command = [sys.executable, "-m", "hqqtrain", *arguments]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, env=env))
    return started


def _wait(processes: list[subprocess.Popen]) -> int:
    """Wait for all processes; return the largest absolute exit status."""
    return max(abs(process.wait()) for process in processes)


def _kill(processes: list[subprocess.Popen], run: Path, while_saving: bool, patience: float,
          rng: random.Random, before: dict[str, tuple[int, int]]) -> bool:  # fmt: skip
    """Kill one rank of `run`, then the others.

    Args:
        processes: One process per rank.
        run: The run directory.
        while_saving: Kill while a checkpoint is written, after up to SAVES - 1 complete ones.
            Otherwise kill after `patience` seconds, or after SAVES checkpoints if that is earlier.
        patience: Seconds to wait; used only without `while_saving`, which waits up to 120 s.
        rng: Source of the random moments.
        before: Partial checkpoints that earlier kills have left, as `_half_written` returns them.

    Returns:
        False if the first rank had finished before it could be killed.
    """
    deadline = time.monotonic() + (120 if while_saving else patience)
    newest, saves_left = _newest(run), rng.randint(0, SAVES - 1) if while_saving else SAVES
    while time.monotonic() < deadline:
        if processes[0].poll() is not None:
            return False
        if _newest(run) != newest:
            newest, saves_left = _newest(run), saves_left - 1
        if saves_left <= 0 and (not while_saving or _half_written(run).items() - before.items()):
            time.sleep(rng.uniform(0, 0.02 if while_saving else 0.2))
            break
        time.sleep(0.001)
    for process in rng.sample(processes, len(processes)):
        process.kill()
        time.sleep(rng.uniform(0, 0.2))
    _wait(processes)
    return True


def _half_written(run: Path) -> dict[str, tuple[int, int]]:
    """Return inode and modification time (ns) of every partial checkpoint folder, by name."""
    partials = {}
    for folder in run.glob("checkpoints/.step-*.partial"):
        with contextlib.suppress(FileNotFoundError):  # complete by now, so it was renamed
            status = folder.stat()
            partials[folder.name] = (status.st_ino, status.st_mtime_ns)
    return partials


def _newest(run: Path) -> str:
    """Return the name of the newest complete checkpoint; empty if there is none."""
    return max((path.name for path in run.glob("checkpoints/step-*")), default="")


def _describe(run: Path, while_saving: bool) -> str:
    """Describe the state in which a kill has left `run`, as one line."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    step = rows[-1]["train/global_step"] if rows else 0
    partial = [path.name for path in run.glob("checkpoints/.step-*")]
    return (
        f"{'while saving' if while_saving else 'at random'}; step {step}, last complete "
        f"checkpoint {_newest(run) or 'none'}, partial {partial or 'none'}"
    )


def _compare(uninterrupted: Path, killed: Path) -> int:
    """Compare adapter, last checkpoint and loss curves; return 0 if all are equal, otherwise 1."""
    files = ["adapter/adapter_model.safetensors"]
    last = _newest(uninterrupted)
    files += [f"checkpoints/{last}/{n}.safetensors" for n in ("adapter_model", "optimizer")]
    is_equal = {file: _bits(uninterrupted / file) == _bits(killed / file) for file in files}
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        expected, actual = _curve(uninterrupted, name), _curve(killed, name)
        is_equal[f"{name}, {len(expected)} values"] = expected == actual
    for compared, same in is_equal.items():
        print(f"{'same bits' if same else 'DIFFERENT'}  {compared}")
    return 0 if all(is_equal.values()) else 1


def _bits(file: Path) -> dict[str, bytes]:
    """Return the raw bytes of every tensor in a safetensors file, by name."""
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def _curve(run: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) for every row of metrics.jsonl that has the metric `name`."""
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["train/global_step"], row[name]) for row in rows if name in row]


if __name__ == "__main__":
    sys.exit(main())
