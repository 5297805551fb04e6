"""Let the store in which ranks meet listen on a single address.

torch's TCPStore accepts every connection, without a password, on all interfaces of the machine. So
everybody in the network could read and change the values that ranks exchange. Ranks connect to the
address of rank 0 only, which is loopback for a run on one machine.

`python -m hqqtrain.distributed.rendezvous -m MODULE ...` runs a launcher in this way, because
torchrun and `accelerate launch` host the store in their own process.
"""

import ipaddress
import runpy
import socket
import sys
from typing import Any

from torch.distributed import TCPStore

from hqqtrain.common.env import get_local_world_size
from hqqtrain.compat import replace_tcp_store


def listen_on_master_address() -> None:
    """Let every store that torch hosts from now on listen on the address of its host name only."""
    replace_tcp_store(make_store)


def make_store(
    host_name: str, port: int, world_size: int | None = None, is_master: bool = False,
    *args: Any, **options: Any,
) -> TCPStore:  # fmt: skip
    """Create a `TCPStore`. Its server listens on the address of `host_name`.

    If this machine has no such address, torch's server listens as it does by default.
    """
    if is_master and (server := _listen(host_name, port, world_size)):
        port = server.getsockname()[1]
        options["master_listen_fd"] = server.detach()
    return TCPStore(host_name, port, world_size, is_master, *args, **options)


def _listen(host_name: str, port: int, world_size: int | None) -> socket.socket | None:
    """Return a listening socket for the first address of `host_name` that this machine has."""
    is_on_one_machine = world_size in (1, get_local_world_size())
    try:
        addresses = socket.getaddrinfo(host_name, port, type=socket.SOCK_STREAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in addresses:
        # Some systems map their own name to 127.0.1.1, which other machines cannot reach.
        is_loopback = ipaddress.ip_address(address[0]).is_loopback
        if is_loopback and not (is_on_one_machine or _names_loopback(host_name)):
            continue
        server = socket.socket(family, kind, protocol)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(address)
            server.listen(socket.SOMAXCONN)
        except OSError:
            server.close()
            continue
        return server
    return None


def _names_loopback(host_name: str) -> bool:
    return host_name == "localhost" or host_name.startswith("127.") or host_name == "::1"


if __name__ == "__main__":
    listen_on_master_address()
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
