"""Identify the source of a model by its contents, with the work shared among all ranks.

A quantized model, a cache entry and a checkpoint belong to the weights that they were made from.
Each rank hashes some blocks of the source, so a model of 140 GB takes as long as reading it once
from disk, and the pages that were read serve the loading that follows. Later starts find the digest
in the user's cache; see `hqqtrain/common/digest.py`.
"""

from collections.abc import Sequence

from hqqtrain.common.digest import ContentDigest, content_digest, hash_blocks
from hqqtrain.common.errors import UserError
from hqqtrain.common.inputs import model_files
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.source import ModelSource

SMALL_BYTES = 1 << 22
"""Bytes; a smaller file, such as config.json or a tokenizer, is read by every rank."""


def digest_source(source: ModelSource, comm: Communicator, preemption: PreemptionHandler) -> str:
    """Return `sha256:...` of the files of `source`. Collective.

    Only config.json counts for synthetic weights.

    Raises:
        UserError: A file cannot be read, or the ranks do not have the same files.
        PreemptedError: A rank was asked to stop; checked after every block.
    """
    names = ["config.json"] if source.kind == "synthetic" else model_files(source.path)
    with comm.raise_on_all_ranks():
        digest = ContentDigest(source.path, names) if comm.is_main else None
    _check_same_files(source, names, comm)
    blocks = comm.all_gather_object(digest and digest.blocks)[0]
    with comm.raise_on_all_ranks():
        mine = blocks[comm.rank :: comm.size]
        own_hashes = hash_blocks(source.path, mine, preemption.check_local)
    hashes_of_ranks = comm.all_gather_object(own_hashes)
    # Block i was hashed by rank i mod size, as its hash number i // size.
    hashes = [hashes_of_ranks[i % comm.size][i // comm.size] for i in range(len(blocks))]
    return comm.run_on_rank0(lambda: digest.finish(hashes) if digest else "")


def _check_same_files(source: ModelSource, names: Sequence[str], comm: Communicator) -> None:
    """Check that all ranks have files of the same sizes, and small files of the same content.

    Ranks whose files differ would build different models, and wait for each other without end.
    """
    if comm.size == 1:
        return
    with comm.raise_on_all_ranks():
        sizes = {name: (source.path / name).stat().st_size for name in names}
        small = [name for name, size in sizes.items() if size < SMALL_BYTES]
        files = {name: content_digest(source.path, [name]) for name in small}
        files |= {name: str(size) for name, size in sizes.items() if name not in files}
    of_ranks = comm.all_gather_object(files)
    for rank, other in enumerate(of_ranks):
        if different := sorted(dict(of_ranks[0].items() ^ other.items())):
            raise UserError(
                f"model.name_or_path={source.name}: {different[0]} is not the same on rank {rank} "
                "as on rank 0; use the same files on all machines."
            )
