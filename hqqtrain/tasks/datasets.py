"""The tokenized datasets of a run: training data and held-out set."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.config.data_sources import describe_source
from hqqtrain.config.run import RunConfig
from hqqtrain.data.eval_set import load_eval_set
from hqqtrain.data.layout import BatchLayout
from hqqtrain.data.mixture import EpochExamples
from hqqtrain.data.packing import TokenizedData, pack_examples
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.data.statistics import DataStatistics, measure_data
from hqqtrain.data.texts import training_texts
from hqqtrain.data.tokenization import check_token_ids
from hqqtrain.distributed.comm import Communicator
from hqqtrain.loading.plan import ModelPlan
from hqqtrain.models.fqn import base_model
from hqqtrain.models.rope import max_batched_length
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.token_cache import CachedTokens, cached_tokens
from hqqtrain.tasks.token_identity import token_identity

logger = logging.getLogger(__name__)


def batch_layout(config: RunConfig, plan: ModelPlan, comm: Communicator) -> BatchLayout:
    """Return how texts are arranged in batches for the model of `plan`, the same on all ranks.

    Collective. If `train.packing` cannot be honored, the log says so.
    """
    train = config.train
    assert plan.packing is not None
    length = max_batched_length(plan.model)
    context, _ = config.eval.window_shape(train.max_seq_len)
    if length is not None and length >= max(train.max_seq_len, context):
        length = None  # no text is that long
    reason = plan.packing.reason
    if length is not None and not reason:
        reason = f"computes a text of more than {length} tokens and a shorter one differently"
    packs = all(comm.all_gather_object(not reason))
    if not packs and train.packing and config.task == "finetune" and comm.is_main:
        logger.warning(
            "train.packing=true: %s %s, so each text has a row of its own; a step still trains on "
            "the texts of train.global_batch_size sequences",
            type(base_model(plan.model)).__name__,
            reason or "was found unfit on another rank",
        )
    return BatchLayout(packs, length)


def load_training_data(
    run: Run,
    tokenizer_folder: Path,
    vocab_size: int | None = None,
) -> TokenizedData | CachedTokens:
    """Tokenize and pack `data.source`, except for held-out texts, unless a run has. Collective.

    With streaming, only the first rows are read.

    Args:
        run: The run.
        tokenizer_folder: The folder of the model's tokenizer.
        vocab_size: Number of token ids that the model knows; None if there is no model.

    Raises:
        UserError: The text cannot be read, overlaps with the held-out text, or has unknown tokens.
        PreemptedError: A rank has received a signal; checked between batches of texts.
    """
    config, comm, length = run.config, run.runtime.comm, run.config.train.max_seq_len
    where = f"data.source={describe_source(config.data.source)}"

    def build(
        tokenizer: PreTrainedTokenizerBase, folder: Path | None, on_batch: Callable[[], object]
    ) -> TokenizedData:
        texts = training_texts(config.data, config.eval)
        tokens = pack_examples(
            run.recorder.progress_bars.count_tokenized(texts),
            tokenizer,
            max_seq_len=length,
            packing=config.train.packing,
            data=config.data,
            where=where,
            on_batch=on_batch,
            folder=folder,
        )
        uses = texts.uses() if isinstance(texts, EpochExamples) else ()
        return TokenizedData(tokens.parts, tokens.sequences, uses)

    settings = {
        "train.max_seq_len": length,
        "train.packing": config.train.packing,
        **_protocol_setting(config),  # it decides which split the text must not overlap with
    }
    data = _find_or_build(run, "train", build, settings, where, tokenizer_folder, vocab_size)
    with comm.raise_on_all_ranks():
        if config.task == "finetune" and comm.is_main and _is_notable(data.parts):
            _log_figures(config, measure_data(data.parts, data.sequences, length))
    return data


def _is_notable(parts: TokenSequences) -> bool:
    """Whether some tokens are not trained; of plain text that is cut, only the last may not be."""
    return not parts.is_plain_text or len(parts.stream) - int((parts.end - parts.begin).sum()) > 1


def _log_figures(config: RunConfig, data: DataStatistics) -> None:
    """Log how many tokens of the examples are trained, and what is left out."""
    where, length = f"data.source={describe_source(config.data.source)}", config.train.max_seq_len
    logger.info(
        "%s: %s examples; %s of %s tokens are trained (%.0f %%), in %s sequences of up to %d "
        "tokens with %.1f %% padding; task=data shows them",
        where, f"{data.examples:,}", f"{data.trained_tokens:,}", f"{data.tokens:,}",
        100 * data.trained_tokens / data.tokens, f"{data.sequences:,}", length, 100 * data.padding,
    )  # fmt: skip
    if data.truncated:
        logger.warning(
            "%s: %d of %d examples have more than %d tokens and are truncated; see data.on_long "
            "and train.max_seq_len",
            where, data.truncated, data.examples, length,
        )  # fmt: skip
    if data.dropped:
        logger.warning(
            "%s: %d of %d examples are left out: none of their first %d tokens is trained, or they "
            "are longer and data.on_long=drop",
            where, data.dropped, data.examples, length,
        )  # fmt: skip


def load_held_out_data(
    run: Run, tokenizer_folder: Path, vocab_size: int | None = None
) -> TokenSequences | None:
    """Return the windows of `eval.source` that `eval.protocol` measures. Collective.

    It is None if `eval.source` is null. The tokens of an earlier run with the same text are reused.
    """
    config, length = run.config, run.config.train.max_seq_len
    if config.eval.source is None:
        return None

    def build(
        tokenizer: PreTrainedTokenizerBase, folder: Path | None, on_batch: Callable[[], object]
    ) -> TokenizedData:
        windows = load_eval_set(
            config.eval, config.data, tokenizer, length, on_batch=on_batch, folder=folder
        )
        assert windows is not None
        return TokenizedData(windows, windows)

    settings = {"eval.tokens": config.eval.tokens, **_protocol_setting(config)}
    if not config.eval.joins_texts:
        settings["train.max_seq_len"] = length
    where = f"eval.source={config.eval.source}"
    return _find_or_build(
        run, "eval", build, settings, where, tokenizer_folder, vocab_size
    ).sequences


def _protocol_setting(config: RunConfig) -> dict[str, object]:
    """Return `eval.protocol`, unless it is the default, which older entries do not name."""
    return {"eval.protocol": config.eval.protocol} if config.eval.joins_texts else {}


def _find_or_build(
    run: Run,
    kind: str,
    build: Callable[[PreTrainedTokenizerBase, Path | None, Callable[[], object]], TokenizedData],
    settings: Mapping[str, object],
    where: str,
    tokenizer_folder: Path,
    vocab_size: int | None,
) -> TokenizedData | CachedTokens:
    """Return the tokens of some data: those of an earlier run, or new ones. Collective.

    Args:
        run: The run.
        kind: `train` or `eval`; see `cached_tokens`.
        build: Makes the tokens with a tokenizer, and writes them into a folder, or keeps them in
            memory; see `cached_tokens`.
        settings: The settings that the tokens depend on, by config key; see `token_identity`.
        where: `key=source`, for messages.
        tokenizer_folder: The folder of the model's tokenizer.
        vocab_size: Number of token ids that the model knows; None if there is no model.

    Raises:
        UserError: The data cannot be read, or has a token that the model does not know.
        PreemptedError: A rank has received a signal.
    """
    config, comm = run.config, run.runtime.comm
    data: TokenizedData | CachedTokens
    with comm.raise_on_all_ranks():
        tokenizer = load_tokenizer(tokenizer_folder)
    if config.data.streaming:  # rows that were not read yet cannot give an entry a name
        with comm.raise_on_all_ranks():
            data = build(tokenizer, None, run.runtime.preemption.check_local)
    else:
        identity = partial(token_identity, config, tokenizer, tokenizer_folder, **settings)
        data = cached_tokens(run, kind, identity, partial(build, tokenizer))
    with comm.raise_on_all_ranks():
        if vocab_size is not None:
            check_token_ids(data.sequences.stream, tokenizer, vocab_size, where)
    return data


def sample_held_out_data(
    config: RunConfig, tokenizer_folder: Path, vocab_size: int
) -> TokenSequences | None:
    """Tokenize a sample of `eval.source` in the memory of this rank; see `load_held_out_data`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    windows = load_eval_set(config.eval, config.data, tokenizer, config.train.max_seq_len)
    if windows is not None:
        check_token_ids(windows.stream, tokenizer, vocab_size, f"eval.source={config.eval.source}")
    return windows


def check_same_text(run: Run, *texts: TokenSequences | None) -> None:
    """Check that all ranks have read the same text. Collective.

    Machines may have different files. They may also have different versions of Python, whose
    standard library is the text of `python_stdlib`.

    Raises:
        UserError: The text of some ranks differs.
    """
    digests = [text.digest if text else "" for text in texts]
    digests_of_ranks = run.runtime.comm.all_gather_object(digests)
    if any(of_rank != digests for of_rank in digests_of_ranks):
        raise UserError(
            f"data.source={describe_source(run.config.data.source)}, "
            f"eval.source={run.config.eval.source}: "
            "the text is not the same on all ranks; use the same files and the same Python "
            "version on all machines."
        )
