"""The texts of a run, tokenized: what it trains on and what it is measured on."""

from hqqtrain.common.errors import UserError
from hqqtrain.data.eval_set import evaluation_set
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import training_texts
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.tokenizer import load_tokenizer


def load_training_data(plan: ModelPlan, runtime: Runtime) -> TokenSequences:
    """`data.source`, packed. Raises PreemptedError between texts, where a signal came."""
    config, tokenizer = runtime.config, load_tokenizer(plan.source.tokenizer)
    return pack_texts(
        training_texts(config.data, config.eval), tokenizer, max_seq_len=config.train.max_seq_len,
        packing=config.train.packing, on_batch=runtime.preemption.check_local,
    )  # fmt: skip


def load_held_out_data(plan: ModelPlan, runtime: Runtime) -> TokenSequences | None:
    """`eval.tokens` of `eval.source`; None where that is null."""
    config, tokenizer = runtime.config, load_tokenizer(plan.source.tokenizer)
    return evaluation_set(config.eval, config.data, tokenizer, config.train.max_seq_len)


def check_same_text(runtime: Runtime, *texts: TokenSequences | None) -> None:
    """Refuses ranks that read other text, as another Python's library. Collective."""
    digests = runtime.comm.gather([text.digest() if text else "" for text in texts])
    if len({tuple(digest) for digest in digests}) > 1:
        raise UserError(
            f"data.source={runtime.config.data.source}, eval.source={runtime.config.eval.source}: "
            "are not the same text on all ranks; use one Python and one set of files everywhere."
        )
