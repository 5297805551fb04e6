"""The tokenized datasets of a run: training data and held-out set."""

from hqqtrain.common.errors import UserError
from hqqtrain.data.eval_set import evaluation_set
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import training_texts
from hqqtrain.distributed.runtime import Runtime
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.tokenizer import load_tokenizer


def load_training_data(plan: ModelPlan, runtime: Runtime) -> TokenSequences:
    """Tokenize and pack `data.source`.

    Raises:
        PreemptedError: This rank has received a signal; checked between texts.
    """
    config, tokenizer = runtime.config, load_tokenizer(plan.source.tokenizer)
    return pack_texts(
        training_texts(config.data, config.eval),
        tokenizer,
        max_seq_len=config.train.max_seq_len,
        packing=config.train.packing,
        on_batch=runtime.preemption.check_local,
    )


def load_held_out_data(plan: ModelPlan, runtime: Runtime) -> TokenSequences | None:
    """Tokenize the first `eval.tokens` tokens of `eval.source`; None if that is null."""
    config, tokenizer = runtime.config, load_tokenizer(plan.source.tokenizer)
    return evaluation_set(config.eval, config.data, tokenizer, config.train.max_seq_len)


def check_same_text(runtime: Runtime, *texts: TokenSequences | None) -> None:
    """Check that all ranks have read the same text. Collective.

    Machines may differ in their files, or in the version of Python whose library is the text.

    Raises:
        UserError: The text of some ranks differs.
    """
    digests = runtime.comm.gather([text.digest() if text else "" for text in texts])
    if len({tuple(digest) for digest in digests}) > 1:
        raise UserError(
            f"data.source={runtime.config.data.source}, eval.source={runtime.config.eval.source}: "
            "the text is not the same on all ranks; use one Python and one set of files everywhere."
        )
