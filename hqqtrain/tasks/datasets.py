"""The tokenized datasets of a run: training data and held-out set."""

from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import load_training_texts
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run


def load_training_data(run: Run, tokenizer: Path) -> TokenSequences:
    """Tokenize and pack `data.source`.

    Raises:
        PreemptedError: This rank has received a signal; checked between texts.
    """
    config = run.config
    return pack_texts(
        load_training_texts(config.data, config.eval),
        load_tokenizer(tokenizer),
        max_seq_len=config.train.max_seq_len,
        packing=config.train.packing,
        on_batch=run.runtime.preemption.check_local,
    )


def load_held_out_data(config: RunConfig, tokenizer: Path) -> TokenSequences | None:
    """Tokenize the first `eval.tokens` tokens of `eval.source`; None if that is null."""
    return load_eval_set(
        config.eval, config.data, load_tokenizer(tokenizer), config.train.max_seq_len
    )


def check_same_text(run: Run, *texts: TokenSequences | None) -> None:
    """Check that all ranks have read the same text. Collective.

    Machines may differ in their files, or in the version of Python whose library is the text.

    Raises:
        UserError: The text of some ranks differs.
    """
    digests = run.runtime.comm.gather([text.digest() if text else "" for text in texts])
    if len({tuple(digest) for digest in digests}) > 1:
        raise UserError(
            f"data.source={run.config.data.source}, eval.source={run.config.eval.source}: "
            "the text is not the same on all ranks; use one Python and one set of files everywhere."
        )
