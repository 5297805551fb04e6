"""Shows that a run which is killed again and again ends in the bits of one that was left alone.

    python scripts/kill_and_resume.py --ranks 2 --kills 30 --root /tmp/killed

Trains the tiny model once without a break. Then trains it again, kills it by SIGKILL at a random
moment, every other time while it writes a checkpoint, and starts it by the same command, until it
was killed so many times and has ended. No start is left to save more than a few times. Adapter,
optimizer state and every step's loss must agree bit for bit. On a CPU; some 15 seconds a kill.
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
    "eval.every=20", "ckpt.every=3", "track.backends=[]",
)  # fmt: skip


SAVES = 4
"""At most, of a start that is to be killed; so --steps are enough on any machine."""
STEPS = 15
"""Per kill: more than SAVES checkpoints have."""


def main() -> int:
    """One run that is left alone, one that is killed; 0 where they agree."""
    options = _options()
    chance = random.Random(options.seed)
    steps = options.steps or STEPS * (options.kills + 2)
    words = [*RECIPE, f"train.max_steps={steps}", *_data(options.root)]
    whole, killed = options.root / "whole", options.root / "killed"
    began = time.monotonic()
    assert _end(_start([*words, f"run.root={whole}"], options.ranks, whole)) == 0, "see output-*"
    seconds = time.monotonic() - began
    print(f"left alone: {steps} steps on {options.ranks} ranks, {seconds:.0f} s", flush=True)
    kills = 0
    while True:
        before = _half_written(killed / "run")
        processes = _start([*words, f"run.root={killed}"], options.ranks, killed)
        if kills < options.kills:
            while_saving = kills % 2 == 1
            patience = chance.uniform(0, options.patience)
            if _kill(processes, killed / "run", while_saving, patience, chance, before):
                kills += 1
                print(f"kill {kills}: {_told(killed / 'run', while_saving)}", flush=True)
                continue
        code = _end(processes)
        break
    print(f"killed {kills} times; the last start ended with {code}", flush=True)
    if kills < options.kills:
        print("it ended before; give more --steps")
        return 1
    return _compare(whole / "run", killed / "run")


def _data(root: Path) -> list[str]:
    """Words for two small texts: a start by the whole library takes seconds more."""
    root.mkdir(parents=True, exist_ok=True)
    words = []
    for key, module in (("data", argparse), ("eval", random)):
        (root / f"{key}.txt").write_text(inspect.getsource(module))
        words.append(f"{key}.source={root / key}.txt")
    return words


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, help=f"{STEPS} a kill where not given")
    parser.add_argument("--patience", type=float, default=20, help="seconds until a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--root", type=Path, required=True, help="a new folder")
    return parser.parse_args()


def _start(words: list[str], ranks: int, root: Path) -> list[subprocess.Popen]:
    """One process a rank, as a launcher starts them."""
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
            command = [sys.executable, "-m", "hqqtrain", *words]
            started.append(subprocess.Popen(command, stdout=output, stderr=output, env=env))
    return started


def _end(processes: list[subprocess.Popen]) -> int:
    return max(abs(process.wait()) for process in processes)


def _kill(processes: list[subprocess.Popen], run: Path, while_saving: bool, patience: float,
          chance: random.Random, before: dict[str, tuple[int, int]]) -> bool:  # fmt: skip
    """Kills one rank, and then the others; False where they had ended before.

    `before`: what earlier kills have left half written.
    """
    deadline = time.monotonic() + (120 if while_saving else patience)
    old, saves = _newest(run), chance.randint(0, SAVES - 1) if while_saving else SAVES
    while time.monotonic() < deadline:
        if processes[0].poll() is not None:
            return False
        if _newest(run) != old:
            old, saves = _newest(run), saves - 1
        if saves <= 0 and (not while_saving or _half_written(run).items() - before.items()):
            time.sleep(chance.uniform(0, 0.02 if while_saving else 0.2))
            break
        time.sleep(0.001)
    for process in chance.sample(processes, len(processes)):
        process.kill()
        time.sleep(chance.uniform(0, 0.2))
    _end(processes)
    return True


def _half_written(run: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change (ns) of every folder that is no checkpoint yet, by name."""
    found = {}
    for folder in run.glob("checkpoints/.step-*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it is a checkpoint now
            facts = folder.stat()
            found[folder.name] = (facts.st_ino, facts.st_mtime_ns)
    return found


def _newest(run: Path) -> str:
    return max((path.name for path in run.glob("checkpoints/step-*")), default="")


def _told(run: Path, while_saving: bool) -> str:
    left = [path.name for path in run.glob("checkpoints/.step-*")]
    where = f"last whole checkpoint {_newest(run) or 'none'}, half written {left or 'none'}"
    return f"{'while saving' if while_saving else 'at random'}; step {_reached(run)}, {where}"


def _reached(run: Path) -> int:
    """The last step in metrics.jsonl."""
    file = run / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return rows[-1]["train/global_step"] if rows else 0


def _compare(whole: Path, killed: Path) -> int:
    files = ["adapter/adapter_model.safetensors"]
    last = max(path.name for path in whole.glob("checkpoints/step-*"))
    files += [f"checkpoints/{last}/{n}.safetensors" for n in ("adapter_model", "optimizer")]
    agree = {file: _bits(whole / file) == _bits(killed / file) for file in files}
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        ours, theirs = _curve(whole, name), _curve(killed, name)
        agree[f"{name}, {len(ours)} values"] = ours == theirs
    for what, same in agree.items():
        print(f"{'same bits' if same else 'DIFFERENT'}  {what}")
    return 0 if all(agree.values()) else 1


def _bits(file: Path) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in load_file(file).items()}


def _curve(run: Path, name: str) -> list[tuple[int, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["train/global_step"], row[name]) for row in rows if name in row]


if __name__ == "__main__":
    sys.exit(main())
