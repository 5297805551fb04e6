"""The texts of a run, tokenized: what it trains on and what it is measured on."""

from hqqtrain.config import UserError
from hqqtrain.data import Sequences, evaluation_set, pack, training_texts
from hqqtrain.models import load_tokenizer
from hqqtrain.tasks.plan import Plan
from hqqtrain.train.session import Session


def training_data(plan: Plan, session: Session) -> Sequences:
    """`data.source`, packed. Raises PreemptedError between texts, where a signal came."""
    config, tokenizer = session.config, load_tokenizer(plan.source.tokenizer)
    return pack(
        training_texts(config.data, config.eval), tokenizer, max_seq_len=config.train.max_seq_len,
        packing=config.train.packing, on_batch=session.interrupt.check_alone,
    )  # fmt: skip


def held_out_data(plan: Plan, session: Session) -> Sequences | None:
    """`eval.tokens` of `eval.source`; None where that is null."""
    config, tokenizer = session.config, load_tokenizer(plan.source.tokenizer)
    return evaluation_set(config.eval, config.data, tokenizer, config.train.max_seq_len)


def check_same_text(session: Session, *texts: Sequences | None) -> None:
    """Refuses ranks that read other text, as another Python's library. Collective."""
    digests = session.processes.gather([text.digest() if text else "" for text in texts])
    if len({tuple(digest) for digest in digests}) > 1:
        raise UserError(
            f"data.source={session.config.data.source}, eval.source={session.config.eval.source}: "
            "are not the same text on all ranks; use one Python and one set of files everywhere."
        )
