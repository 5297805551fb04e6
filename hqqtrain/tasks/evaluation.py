"""Evaluate the model of a run, and record the results.

`Evaluator` measures and writes nothing; this module connects it with the recorder.
"""

import logging
import math
from collections.abc import Container, Iterable
from contextlib import nullcontext
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hqqtrain.config.run import RunConfig
from hqqtrain.data.chat.end_markers import end_markers
from hqqtrain.data.chat.template import ChatTemplate
from hqqtrain.data.layout import PACKED, BatchLayout
from hqqtrain.data.sequences import TokenSequences
from hqqtrain.evaluation.continuations import select_beginnings, select_prompts
from hqqtrain.evaluation.evaluator import Evaluator
from hqqtrain.evaluation.perplexity import EvalResult
from hqqtrain.evaluation.streamed_reference import StreamedReference
from hqqtrain.loading.model_builder import RunnableModel
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.report.samples import Sample
from hqqtrain.rundir.schema import MODEL_NAMES
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.reference import open_reference

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 64
"""Length of a sample in the report, or of a reply to a chat, if sequences are long enough."""


class RecordedEvaluation:
    """Evaluates the model of a run and records every result.

    Without a held-out set (`eval.source=null`) its methods do nothing. The constructor opens the
    full-precision reference model; see `open_reference`. It is a collective.

    Args:
        run: Settings of the evaluation, and the recorder.
        runnable: The model to evaluate.
        held_out: The held-out set, if any.
        layout: Which texts may share a batch.
        source_digest: The digest of the model's source, if the caller knows it.
    """

    def __init__(
        self,
        run: Run,
        runnable: RunnableModel,
        held_out: TokenSequences | None,
        layout: BatchLayout = PACKED,
        source_digest: str | None = None,
    ) -> None:
        self._run, self._recorder, self._runnable = run, run.recorder, runnable
        self._evaluator: Evaluator | None = None
        if not held_out:
            return
        config, runtime, train = run.config, run.runtime, run.config.train
        batch_size = config.eval.batch_size(train.micro_batch_size, train.max_seq_len)
        self._reference = open_reference(run, runnable, held_out, layout, batch_size, source_digest)
        self._evaluator = Evaluator(
            held_out,
            runtime.comm,
            runtime.preemption,
            batch_size,
            self._reference,
            runtime.autocast,
            layout,
            config.eval.joins_texts,
            run.recorder.progress_bars.show_evaluating,
        )

    @property
    def base_key(self) -> str:
        """The key of the model without adapter: `quantized`, or `full_precision` if it is not."""
        return "quantized" if self._run.config.quant.quantizes else "full_precision"

    def evaluate_as(self, model_key: str, *, adapted: bool, log: bool = True) -> float | None:
        """Evaluate the model and record the result in the summary under `model_key`. Collective.

        Args:
            model_key: `base_key` or `final`.
            adapted: Whether the adapter is active.
            log: Whether the result is also a point of the curves at the current step.

        Returns:
            The loss in nats per token.
        """
        if self._evaluator is None:
            return None
        evaluator = self._evaluator
        if model_key == "full_precision":  # it is not compared with itself
            evaluator = replace(evaluator, reference=None)
        with nullcontext() if adapted else self._runnable.without_adapter():
            result = evaluator.evaluate(self._runnable.model)
        _warn_if_not_finite(model_key, result)
        self._recorder.record_evaluation(model_key, result, log=log)
        return result.loss

    def record_samples(self) -> None:
        """Record how each model continues a few held-out texts, or answers chats. Collective.

        The models are the full-precision reference, if it is loaded as a whole, the base, and the
        trained one. The texts have fewer tokens than a batch of the evaluation, so they need no
        more memory.
        """
        evaluator, runnable, config = self._evaluator, self._runnable, self._run.config
        if evaluator is None or not config.eval.samples:
            return
        tokenizer = load_tokenizer(runnable.plan.source.tokenizer)
        texts = _select_texts(evaluator.held_out, config)
        prompts, rests = ([pair[i] for pair in texts] for i in (0, 1))
        ends, new_tokens = {tokenizer.eos_token_id}, len(rests[0])
        end_texts: tuple[str, ...] = ()
        is_chat = not _is_plain_text(evaluator.held_out, config)
        if is_chat:  # an answer may be short, and ends with a token, or with ordinary text
            ends |= {int(rest[-1]) for rest in rests} & set(tokenizer.added_tokens_decoder)
            new_tokens = _reply_tokens(config)
            if tokenizer.chat_template:
                end_texts = end_markers(ChatTemplate(tokenizer))

        def decode(rows: Iterable[Tensor]) -> list[str]:
            return [_decode(tokenizer, row[:new_tokens].tolist(), ends, end_texts) for row in rows]

        def continuations(model: nn.Module) -> list[str]:
            return decode(evaluator.continue_texts(model, prompts, new_tokens))

        columns = {"held-out text": decode(rests)}
        # A streamed model can be called for the held-out set alone. A base that is not quantized is
        # the full-precision model.
        if (
            self._reference
            and not isinstance(self._reference, StreamedReference)
            and self.base_key == "quantized"
        ):
            columns[MODEL_NAMES["full_precision"]] = continuations(self._reference)
        with runnable.adapter_disabled():
            columns[MODEL_NAMES[self.base_key]] = continuations(runnable.model)
        columns[MODEL_NAMES["final"]] = continuations(runnable.model)
        shown = [_decode(tokenizer, row.tolist(), set() if is_chat else ends) for row in prompts]
        self._recorder.samples = [
            Sample(prompt, {name: column[row] for name, column in columns.items()}, is_chat)
            for row, prompt in enumerate(shown)
        ]

    def evaluate_during_training(self) -> float | None:
        """Evaluate during training; record and return the loss in nats per token. Collective."""
        if self._evaluator is None:
            return None
        result = self._evaluator.evaluate(self._runnable.model)
        _warn_if_not_finite("trained", result)
        self._recorder.log_evaluation(result)
        return result.loss


def _is_plain_text(held_out: TokenSequences, config: RunConfig) -> bool:
    """Whether the held-out texts are plain text, as texts that are joined always are."""
    return config.eval.joins_texts or held_out.is_plain_text


def _warn_if_not_finite(model_key: str, result: EvalResult) -> None:
    """Warn about every measured number that is infinite or NaN, because nothing can be compared."""
    measured = {
        "the perplexity": result.perplexity,
        "the perplexity of the full-precision model": result.reference_perplexity,
        "the KL divergence": result.kl,
    }
    for name, value in measured.items():
        if value is not None and not math.isfinite(value):
            logger.warning(
                "%s model: %s on the held-out text is %s, so its figures mean nothing. Check the "
                "weights and train.precision; more bits (quant.nbits) help if only the quantized "
                "model is affected.",
                MODEL_NAMES.get(model_key, model_key), name, value,
            )  # fmt: skip


def _select_texts(held_out: TokenSequences, config: RunConfig) -> list[tuple[Tensor, Tensor]]:
    """Return the prompts to continue, and what follows each of them in the held-out text."""
    train = config.train
    length, max_tokens = (
        min(SAMPLE_TOKENS, train.max_seq_len),
        train.micro_batch_size * train.max_seq_len,
    )
    if not _is_plain_text(held_out, config):
        chats = select_prompts(held_out, config.eval.samples, max_tokens, _reply_tokens(config))
        if chats:
            return chats
    texts = select_beginnings(held_out, min(config.eval.samples, max_tokens // length), length)
    prompts, rests = texts.tensor_split([(texts.shape[1] + 1) // 2], dim=1)
    return list(zip(prompts, rests, strict=True))


def _reply_tokens(config: RunConfig) -> int:
    """Return the number of tokens of a reply to a chat, which leaves room for a prompt."""
    return min(SAMPLE_TOKENS, config.train.max_seq_len // 2)


def _decode(
    tokenizer: PreTrainedTokenizerBase,
    tokens: list[int],
    ends: Container[int],
    end_texts: Iterable[str] = (),
) -> str:
    """Return the text of `tokens` up to the first end.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens.
        ends: Tokens that end the text, unless one is the first.
        end_texts: Texts that end it, where the tokenizer lacks such a token.
    """
    end = next((i for i, token in enumerate(tokens) if i and token in ends), len(tokens))
    text = str(tokenizer.decode(tokens[:end]))
    places = [place for end_text in end_texts if (place := text.find(end_text)) >= 0]
    return text[: min(places, default=len(text))]
