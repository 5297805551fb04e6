"""A real Slurm cluster on this machine: munged, slurmctld and two slurmd, run by the tests.

At the end every process of the cluster is found and killed, jobs included. Nothing of the system is
used or changed except for the programs of the packages.
"""

import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from e2e.runs import free_port

NODES = ("127.0.0.1", "127.0.0.2")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
_UNITS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd"}
"""Program -> systemd unit, for the programs that a package may start as a service."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_not() -> str:
    """Install Slurm if possible; return why there is none, or an empty string."""
    if os.geteuid() != 0:
        return "a private Slurm cluster needs root"
    if _missing() and shutil.which("apt-get"):
        _install()
    return f"no {', '.join(_missing())} here, and apt-get cannot install it" if _missing() else ""


def _missing() -> list[str]:
    return [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]


def _install() -> None:
    """Install Debian's packages. New services are disabled; existing ones are left alone."""
    packages = ["install", "-y", "--no-install-recommends", "slurm-wlm"]
    packages += ["munge"] if "munged" in _missing() else []
    new = [unit for program, unit in _UNITS.items() if program in _missing()]
    for words in (packages, ["update"], packages):
        if _missing():
            _quietly("apt-get", "-o", "Acquire::http::Timeout=20", *words)
    if new:
        _quietly("systemctl", "disable", "--now", *new)


def _quietly(*command: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(command, env=env, capture_output=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return  # the caller checks again what is missing


class Cluster:
    """A cluster whose files are in `folder`. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "slurm.conf"
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environ = {**clean, "PATH": _PATH, "SLURM_CONF": str(self.config)}

    def __enter__(self) -> "Cluster":
        text = Path(__file__).with_name("slurm.conf").read_text()
        ports = {f"@PORT{n}@": free_port() for n in ("", 1, 2)}
        for word, value in {"@DIR@": self.folder, **ports}.items():
            text = text.replace(word, str(value))
        self.config.write_text(text)
        for folder in (self.folder / "state", *map(self._spool, NODES)):
            folder.mkdir(parents=True)
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-i", node="")
            for node in NODES:
                self.start_node(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _kill(self._processes())

    def start_node(self, node: str) -> None:
        """Start a node's slurmd and wait until the node accepts jobs."""
        self._start("slurmd", "-D", "-N", node, node=node)
        self.until(lambda: self.run("sinfo", "-h", "-n", node, "-o", "%T").startswith("idle"))

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node at once, like a power failure."""
        _kill(self._processes(node))

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> str:
        """Run a command as a user and return its output. The command must succeed."""
        done = subprocess.run(
            command, cwd=cwd or self.folder, env={**self.environ, **environ}, timeout=120,
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def job(self, job: str) -> dict[str, str]:
        """Return Slurm's record of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        output = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\S+?)=(\S*)", output))

    def ended(self, job: str, seconds: float = 90) -> dict[str, str]:
        """Wait until a job has ended for good, and return its record."""
        self.until(lambda: self.job(job)["JobState"] in ENDED, seconds)
        return self.job(job)

    def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        """Wait until `condition()` is true, for at most `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds} s\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"{file.name}:\n{file.read_text()[-2000:]}" for file in files)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log",
                 "seed-file": "seed"}  # fmt: skip
        options = [f"--{name}={self.folder}/munge.{end}" for name, end in files.items()]
        # --force: the parent of the temporary folder may be writable by everybody.
        self._start("munged", "--foreground", "--force", *options, node="")
        self.until((self.folder / "munge.socket").exists)

    def _start(self, *command: str, node: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            subprocess.Popen(
                command, cwd=self._spool(node), env=self.environ,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _processes(self, node: str = "") -> list[psutil.Process]:
        """List the processes of one node, or of the whole cluster.

        Jobs are recognized by their environment. Slurm's daemons clear theirs, and are recognized
        by their working directory.
        """
        spool, variables = self._spool(node), {"SLURM_CONF": str(self.config)}
        variables |= {"SLURMD_NODENAME": node} if node else {}
        found = []
        for process in psutil.process_iter():
            try:
                is_daemon = Path(process.cwd()).is_relative_to(spool)
                if is_daemon or variables.items() <= process.environ().items():
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _spool(self, node: str) -> Path:
        return self.folder / "spool" / node


def _kill(processes: list[psutil.Process]) -> None:
    """Kill Slurm's daemons first, so that none can report the end of the other processes."""
    processes.sort(key=lambda process: not process.name().startswith("slurm"))
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=10)
