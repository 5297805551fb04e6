"""Identify the source of a model by its contents, with the work shared among all ranks.

A quantized model, a cache entry and a checkpoint belong to the weights that they were made from.
Each rank hashes some blocks of the source, so a model of 140 GB takes as long as reading it once
from disk, and the pages that were read serve the loading that follows. Later starts find the digest
in the user's cache; see `hqqtrain/common/digest.py`.
"""

from hqqtrain.common.digest import ContentDigest, hash_blocks
from hqqtrain.common.inputs import model_files
from hqqtrain.distributed.comm import Communicator
from hqqtrain.distributed.preemption import PreemptionHandler
from hqqtrain.models.source import ModelSource


def digest_source(source: ModelSource, comm: Communicator, preemption: PreemptionHandler) -> str:
    """Return `sha256:...` of the files of `source`. Collective.

    Only config.json counts for synthetic weights.

    Raises:
        UserError: A file cannot be read.
        PreemptedError: A rank was asked to stop; checked after every block.
    """
    names = ["config.json"] if source.kind == "synthetic" else model_files(source.path)
    with comm.raise_on_all_ranks():
        digest = ContentDigest(source.path, names) if comm.is_main else None
    blocks = comm.all_gather_object(digest and digest.blocks)[0]
    with comm.raise_on_all_ranks():
        mine = blocks[comm.rank :: comm.size]
        own_hashes = hash_blocks(source.path, mine, preemption.check_local)
    hashes_of_ranks = comm.all_gather_object(own_hashes)
    # Block i was hashed by rank i mod size, as its hash number i // size.
    hashes = [hashes_of_ranks[i % comm.size][i // comm.size] for i in range(len(blocks))]
    return comm.run_on_rank0(lambda: digest.finish(hashes) if digest else "")
