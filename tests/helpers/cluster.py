"""A real Slurm cluster on this machine: munged, slurmctld and one slurmd per node.

At the end every process of the cluster is killed, including its jobs. The tests change nothing else
in the system, except that they install the packages of Slurm.
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
from runs import free_port

NODES = tuple(f"127.0.0.{n}" for n in range(1, 9))
"""Names of the nodes, some for each purpose: see the partitions in slurm.conf."""
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
PATIENCE = 400
"""Seconds until a test gives up. All tests wait at the same time, on a machine that may be busy."""

_UNITS = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd"}
"""Program -> systemd unit, for the programs that a package may start as a service."""
_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def why_unavailable() -> str:
    """Install Slurm if it is missing; return why it is not available, or an empty string."""
    if os.geteuid() != 0:
        return "a private Slurm cluster needs root"
    if _missing_programs() and shutil.which("apt-get"):
        _install()
    missing = _missing_programs()
    return f"no {', '.join(missing)} here, and apt-get cannot install it" if missing else ""


def _missing_programs() -> list[str]:
    return [name for name in _PROGRAMS if not shutil.which(name, path=_PATH)]


def _install() -> None:
    """Install Debian's packages. New services are disabled; existing ones are left alone."""
    missing = _missing_programs()
    install = ["install", "-y", "--no-install-recommends", "slurm-wlm"]
    install += ["munge"] if "munged" in missing else []
    new_units = [unit for program, unit in _UNITS.items() if program in missing]
    # The first attempt uses the package lists that are present; only if it fails, update them.
    for arguments in (install, ["update"], install):
        if _missing_programs():
            _run_quietly("apt-get", "-o", "Acquire::http::Timeout=20", *arguments)
    if new_units:
        _run_quietly("systemctl", "disable", "--now", *new_units)


def _run_quietly(*command: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        subprocess.run(command, env=env, capture_output=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired):
        return  # the caller checks again which programs are missing


class Cluster:
    """A cluster whose files are in `folder`. Use as a context manager, and from any thread.

    At the end of the context, threads that still use the cluster get an error.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "slurm.conf"
        self._has_ended = False
        outside_slurm = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM", "SBATCH"))
        }
        self.environ = {**outside_slurm, "PATH": _PATH, "SLURM_CONF": str(self.config)}

    def __enter__(self) -> "Cluster":
        text = Path(__file__).with_name("slurm.conf").read_text().replace("@DIR@", str(self.folder))
        ports: set[int] = set()
        while len(ports) < text.count("@PORT@"):
            ports.add(free_port())
        for port in ports:
            text = text.replace("@PORT@", str(port), 1)
        self.config.write_text(text)
        for folder in (self.folder / "state", *map(self._spool, NODES)):
            folder.mkdir(parents=True)
        try:
            self._start_munge()
            self._start("slurmctld", "-D", "-i", node="")
            for node in NODES:
                self._start("slurmd", "-D", "-N", node, node=node)
            self.wait_until(self._all_nodes_are_idle)
        except BaseException as error:
            error.add_note(self.report(self.folder))
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended = True
        _kill(self._processes())

    def kill_node(self, node: str) -> None:
        """Kill everything that runs on a node at once, like a power failure."""
        _kill(self._processes(node))

    def silence_node(self, node: str) -> None:
        """Kill a node's slurmd, so that Slurm takes the node for dead; its jobs run on."""
        _kill([process for process in self._processes(node) if process.name() == "slurmd"])

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> str:
        """Run a command as a user and return its output. The command must succeed."""
        completed = subprocess.run(
            command, cwd=cwd or self.folder, env={**self.environ, **environ}, timeout=PATIENCE,
            capture_output=True, text=True,
        )  # fmt: skip
        assert completed.returncode == 0, f"{command}: {completed.stdout}{completed.stderr}"
        return completed.stdout.strip()

    def job_record(self, job_id: str) -> dict[str, str]:
        """Return Slurm's record of a job: JobState, Restarts, ExitCode, NodeList, ..."""
        output = self.run("scontrol", "--oneliner", "show", "job", job_id)
        return dict(re.findall(r"(\S+?)=(\S*)", output))

    def wait_for_job(self, job_id: str) -> dict[str, str]:
        """Wait until a job has ended and is not requeued, and return its record."""
        self.wait_until(lambda: self.job_record(job_id)["JobState"] in FINAL_STATES, 0.5)
        return self.job_record(job_id)

    def wait_until(self, condition: Callable[[], object], interval: float = 0.2) -> None:
        """Wait until `condition()` is true; ask every `interval` seconds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert not self._has_ended, "the cluster has ended"
            assert time.monotonic() < deadline, f"not true within {PATIENCE} s"
            time.sleep(interval)

    def report(self, folder: Path) -> str:
        """Return the cluster's log, and the outputs and records of the jobs in `folder`."""
        show_jobs = subprocess.run(
            ["scontrol", "--oneliner", "show", "job"], env=self.environ, capture_output=True,
            text=True,
        )  # fmt: skip
        records = [line for line in show_jobs.stdout.splitlines() if f"{folder}/" in line]
        files = [self.folder / "daemons.log", *sorted(folder.glob("**/*.out"))]
        texts = [f"{file}:\n{file.read_text(errors='replace')[-10_000:]}" for file in files]
        return "\n\n".join([*texts, *records, show_jobs.stderr])

    def _all_nodes_are_idle(self) -> bool:
        states = self.run("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
        return {f"{node} idle" for node in NODES} <= set(states)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log",
                 "seed-file": "seed"}  # fmt: skip
        options = [f"--{name}={self.folder}/munge.{suffix}" for name, suffix in files.items()]
        # --force: the parent of the temporary folder may be writable by everybody.
        self._start("munged", "--foreground", "--force", *options, node="")
        self.wait_until((self.folder / "munge.socket").exists)

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
        processes = []
        for process in psutil.process_iter():
            try:
                is_daemon = Path(process.cwd()).is_relative_to(spool)
                if is_daemon or variables.items() <= process.environ().items():
                    processes.append(process)
            except psutil.Error:  # the process has ended, or belongs to another user
                continue
        return processes

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
