"""The tokenized datasets of a run: training data and held-out set."""

from pathlib import Path

from hqqtrain.common.errors import UserError
from hqqtrain.config.run import RunConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.packing import TokenSequences, pack_texts
from hqqtrain.data.sources import load_training_texts
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run


def load_training_data(
    run: Run, tokenizer_folder: Path, vocab_size: int | None = None
) -> TokenSequences:
    """Tokenize and pack `data.source`, except for held-out texts.

    Args:
        run: The run.
        tokenizer_folder: The folder of the model's tokenizer.
        vocab_size: Number of token ids that the model knows; None if there is no model.

    Raises:
        UserError: The text cannot be read, overlaps with the held-out text, or has a token that the
            model does not know.
        PreemptedError: This rank has received a signal; checked between batches of texts.
    """
    config = run.config
    return pack_texts(
        load_training_texts(config.data, config.eval),
        load_tokenizer(tokenizer_folder),
        max_seq_len=config.train.max_seq_len,
        packing=config.train.packing,
        vocab_size=vocab_size,
        where=f"data.source={config.data.source}",
        on_batch=run.runtime.preemption.check_local,
    )


def load_held_out_data(
    config: RunConfig, tokenizer_folder: Path, vocab_size: int | None = None
) -> TokenSequences | None:
    """Tokenize a sample of at most `eval.tokens` tokens of `eval.source`; None if that is null."""
    tokenizer = load_tokenizer(tokenizer_folder)
    return load_eval_set(config.eval, config.data, tokenizer, config.train.max_seq_len, vocab_size)


def check_same_text(run: Run, *texts: TokenSequences | None) -> None:
    """Check that all ranks have read the same text. Collective.

    Machines may have different files. They may also have different versions of Python, whose
    standard library is the text of `python_stdlib`.

    Raises:
        UserError: The text of some ranks differs.
    """
    digests = [text.digest() if text else "" for text in texts]
    digests_of_ranks = run.runtime.comm.all_gather_object(digests)
    if any(of_rank != digests for of_rank in digests_of_ranks):
        raise UserError(
            f"data.source={run.config.data.source}, eval.source={run.config.eval.source}: "
            "the text is not the same on all ranks; use the same files and the same Python "
            "version on all machines."
        )
