"""The config group that says how the work is distributed, with the help text of every key."""

from dataclasses import dataclass

from hqqtrain.config.field import key


@dataclass(kw_only=True, slots=True)
class ParallelConfig:
    """How the work is distributed over processes, and between a GPU and its host."""

    strategy: str = key(
        "auto",
        "parallelism strategy; auto: single for one process, otherwise fsdp2",
        choices=("auto", "single", "ddp", "fsdp2", "fsdp1", "zero3"),
    )
    hsdp: bool = key(False, "with fsdp2: shard within a node and replicate across nodes")
    offload: str = key(
        "none",
        "parameters to keep in host memory; parameters: those of fsdp2, or without training "
        "those of the decoder layers of a single process",
        choices=("none", "parameters"),
    )
    consistency_check_every: int | None = key(
        100,
        "optimizer steps between checks that all ranks agree and the frozen weights are unchanged; "
        "null: never",
        low=1,
    )

    @property
    def offloads_parameters(self) -> bool:
        """Whether the parameters of the model are in host memory between their uses."""
        return self.offload == "parameters"
