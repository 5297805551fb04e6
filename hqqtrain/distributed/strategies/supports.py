"""The settings that a strategy may be combined with, as data; see `check_supported`."""

from dataclasses import dataclass

from hqqtrain.config.conflicts import PAGED_OPTIMIZERS, Conflict

BITSANDBYTES_OPTIMIZERS = ("adamw_8bit", *PAGED_OPTIMIZERS)
"""The values of `optim.name` that bitsandbytes implements."""


@dataclass(frozen=True)
class Supports:
    """The settings that a strategy may be combined with.

    Attributes:
        several_processes: Whether more than one process may run.
        parameter_offload: Whether `parallel.offload=parameters` works.
        hsdp: Whether `parallel.hsdp` works.
        package: Python package that the strategy needs, which is also the name of our extra for
            `pip install`; empty for none.
        conflicts: Values of other keys that the strategy does not support.
    """

    several_processes: bool = True
    parameter_offload: bool = False
    hsdp: bool = False
    package: str = ""
    conflicts: tuple[Conflict, ...] = ()
