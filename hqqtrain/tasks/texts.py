"""The tokenized datasets of a run: training data and held-out set."""

from hqqtrain.config import UserError
from hqqtrain.data import Sequences, evaluation_set, pack, training_texts
from hqqtrain.models import load_tokenizer
from hqqtrain.tasks.plan import Plan
from hqqtrain.train.session import Session


def training_data(plan: Plan, session: Session) -> Sequences:
    """Tokenize and pack `data.source`.

    Raises:
        PreemptedError: This rank has received a signal; checked between texts.
    """
    config, tokenizer = session.config, load_tokenizer(plan.source.tokenizer)
    return pack(
        training_texts(config.data, config.eval),
        tokenizer,
        max_seq_len=config.train.max_seq_len,
        packing=config.train.packing,
        on_batch=session.interrupt.check_alone,
    )


def held_out_data(plan: Plan, session: Session) -> Sequences | None:
    """Tokenize the first `eval.tokens` tokens of `eval.source`; None if that is null."""
    config, tokenizer = session.config, load_tokenizer(plan.source.tokenizer)
    return evaluation_set(config.eval, config.data, tokenizer, config.train.max_seq_len)


def check_same_text(session: Session, *texts: Sequences | None) -> None:
    """Check that all ranks have read the same text. Collective.

    Machines may differ in their files, or in the version of Python whose library is the text.

    Raises:
        UserError: The text of some ranks differs.
    """
    digests = session.processes.gather([text.digest() if text else "" for text in texts])
    if len({tuple(digest) for digest in digests}) > 1:
        raise UserError(
            f"data.source={session.config.data.source}, eval.source={session.config.eval.source}: "
            "the text is not the same on all ranks; use one Python and one set of files everywhere."
        )
