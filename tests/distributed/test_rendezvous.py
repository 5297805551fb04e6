"""The store in which ranks meet listens on one address, also under the launchers that we start."""

import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
from runs import free_port
from torch.distributed import TCPStore

import hqqtrain
from hqqtrain.distributed import rendezvous
from hqqtrain.distributed.rendezvous import make_store

ROOT = Path(hqqtrain.__file__).parents[1]

LIST = """
import os, psutil, torch.distributed as dist

def addresses(pid):
    return {c.laddr.ip for c in psutil.Process(pid).net_connections() if c.status == "LISTEN"}

dist.init_process_group("gloo")
for pid in (os.getpid(), os.getppid()):
    os.write(1, f"listens on {sorted(addresses(pid))}{os.linesep}".encode())
dist.barrier()
"""


def _addresses(port: int) -> set[str]:
    """Return the addresses on which this process listens at `port`."""
    connections = psutil.Process().net_connections()
    return {c.laddr.ip for c in connections if c.status == "LISTEN" and c.laddr.port == port}


def _store(host: str, world_size: int) -> TCPStore:
    timeout = timedelta(seconds=10)
    return make_store(host, 0, world_size, True, timeout, wait_for_workers=False, multi_tenant=True)


def test_the_store_listens_on_loopback_only():
    assert _addresses(TCPStore("127.0.0.1", 0, is_master=True).port) == {"::"}  # torch's default
    store = _store("127.0.0.1", 2)
    assert _addresses(store.port) == {"127.0.0.1"}
    store.set("key", "value")
    client = make_store("127.0.0.1", store.port, 2, False)
    assert client.get("key") == b"value"


def test_a_name_that_leads_to_loopback_serves_one_machine_only(monkeypatch):
    """Debian maps the name of a machine to 127.0.1.1, where other machines cannot reach it."""
    found = [(2, 1, 6, "", ("127.0.1.1", 0))]
    monkeypatch.setattr(rendezvous.socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    server = rendezvous._listen("gpu07", 0, 4)
    assert server is not None
    assert server.getsockname()[0] == "127.0.1.1"
    server.close()
    assert rendezvous._listen("gpu07", 0, 8) is None


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_left_to_torch(host):
    assert rendezvous._listen(host, 0, 1) is None


def test_a_launcher_and_its_ranks_listen_on_no_other_interface(tmp_path: Path):
    (tmp_path / "task.py").write_text(LIST)
    words = ["-m", "hqqtrain.distributed.rendezvous", "-m", "torch.distributed.run"]
    words += ["--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
    words += ["--master_port", str(free_port()), str(tmp_path / "task.py")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120,
                          env=env | {"GLOO_SOCKET_IFNAME": "lo"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "listens on" in line]
    assert len(lines) == 4
    assert set(lines) == {"listens on ['127.0.0.1']"}
