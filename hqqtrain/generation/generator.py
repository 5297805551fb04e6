"""Generate text: `generate` for a few prompts, `TextGenerator` for a model that stays loaded.

`StaticDecoder` generates with a compiled model, and transformers' own `generate` in all other
cases. This module adds the settings, the end of a turn, and the time of both phases.
"""

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from hqqtrain.common.errors import UserError
from hqqtrain.config.public_function import public_function
from hqqtrain.generation.prompts import Prompt, PromptEncoder, list_prompts
from hqqtrain.generation.settings import (
    CACHE_TOKENS,
    SAMPLING_OF_THE_MODEL,
    Sampling,
    check_settings,
    merged_generation_config,
)
from hqqtrain.generation.static_decoder import compiles, static_decoder
from hqqtrain.generation.streamer import EndOfReply, ReplyStreamer
from hqqtrain.models.causal_lm import translate_model_errors
from hqqtrain.models.fqn import base_model

MAX_NEW_TOKENS = 512
"""Largest number of tokens of a reply, by default."""


@dataclass(frozen=True)
class Generation:
    """A generated text.

    Attributes:
        text: The text, without the prompt and without the token that ended it.
        token_ids: Its tokens, with the token that ended it.
        prompt_tokens: Number of tokens of the prompt.
        is_complete: Whether the model has ended the text. Otherwise it has the largest number of
            tokens.
        prefill_seconds: Time from the prompt to the first token.
        decode_seconds: Time from the first token to the last one.
    """

    text: str
    token_ids: list[int]
    prompt_tokens: int
    is_complete: bool
    prefill_seconds: float
    decode_seconds: float


class TextGenerator:
    """Generates texts with one model, one at a time.

    Args:
        model: A causal language model of transformers, or one with PEFT adapters, on one device.
            Its `generation_config` has the settings that `sampling` leaves open.
        tokenizer: Its tokenizer.
        sampling: How tokens are chosen.
        chat: Whether prompts are answered, see `PromptEncoder`.
        system: The system message of chats that have none.
        max_new_tokens: Largest number of tokens of a text; None: until the model ends it, or until
            its context is full.
        compile: Whether the model is compiled for decoding, with a static cache; None: on a CUDA
            device, if the code of the model allows it and all its weights are on the device.

    Raises:
        UserError: `chat` is true, and the tokenizer has no chat template; or `compile` is true, and
            the code of the model does not work with a static cache, or weights of it stay in host
            memory.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        sampling: Sampling = SAMPLING_OF_THE_MODEL,
        chat: bool | None = None,
        system: str | None = None,
        max_new_tokens: int | None = MAX_NEW_TOKENS,
        compile: bool | None = None,
    ) -> None:
        self.prompts = PromptEncoder(model, tokenizer, chat=chat, system=system)
        self._model, self._tokenizer, self._sampling = model, tokenizer, sampling
        self._max_new_tokens = max_new_tokens
        if max_new_tokens is not None and max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens}: must be at least 1, or None.")
        if max_new_tokens is None and self.prompts.context is None:
            raise UserError(
                "generate.max_new_tokens=null: the model has no largest context, so a text might "
                "never end; set a number."
            )
        base = base_model(model)
        self.device = next(base.parameters()).device
        self.compiles = compiles(base, self.device, compile)
        self._has_decoder = bool(self.compiles)

    def generate(
        self, prompt: Prompt, on_text: Callable[[str], object] = lambda _: None
    ) -> Generation:
        """Generate the text that follows a prompt.

        Args:
            prompt: A text, or the messages of a chat.
            on_text: Called with each piece of the text as soon as it is known.

        Raises:
            UserError: The prompt is empty or too long, or the chat template does not take it.
        """
        ids = self.prompts.encode(prompt)
        room, cache_tokens = self._lengths(len(ids))
        base = base_model(self._model)
        config = merged_generation_config(
            base.generation_config,
            self._sampling,
            self.prompts.end_ids if self.prompts.is_chat else (),
            max_new_tokens=room,
            cache_tokens=cache_tokens,
            compile_anywhere=self.device.type != "cuda",
        )
        streamer = ReplyStreamer(self._tokenizer, self.prompts.end_texts, on_text)
        input_ids = torch.tensor([ids], device=self.device)
        with (
            _in_evaluation(self._model),
            _settings_of(base, config),
            translate_model_errors(base),
            _translate_setting_errors(),
        ):
            self._run(input_ids, config, cache_tokens, streamer)
        tokens, eos = streamer.token_ids, config.eos_token_id or ()
        return Generation(
            streamer.text,
            tokens,
            len(ids),
            streamer.has_ended or tokens[-1] in eos,
            streamer.prefill_seconds,
            streamer.decode_seconds,
        )

    def _lengths(self, prompt_tokens: int) -> tuple[int, int | None]:
        """Return the largest number of new tokens, and the size of a static cache, if there is."""
        context, room = self.prompts.context, self._max_new_tokens
        if context is not None:
            room = min(context - prompt_tokens, room or context)
        assert room is not None
        if not self.compiles:
            return room, None
        needed = -(-(prompt_tokens + room) // CACHE_TOKENS) * CACHE_TOKENS
        return room, min(needed, context or needed)

    def _run(
        self, input_ids: Tensor, config: GenerationConfig, cache_tokens: int | None,
        streamer: ReplyStreamer,
    ) -> None:  # fmt: skip
        """Generate with a compiled step if it is wanted and can be, otherwise with transformers."""
        if cache_tokens is not None and self._has_decoder:
            decoder = static_decoder(self._model, config, cache_tokens)
            self._has_decoder = decoder is not None
            if decoder is not None:
                assert config.max_new_tokens is not None
                decoder.generate(self._model, input_ids, config.max_new_tokens, streamer)
                return
        cast(Any, self._model).generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=[EndOfReply(streamer)],
        )


@public_function(model=nn.Module, tokenizer=PreTrainedTokenizerBase)
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompt | Sequence[Prompt],
    *,
    chat: bool | None = None,
    system: str | None = None,
    max_new_tokens: int | None = MAX_NEW_TOKENS,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    seed: int | None = None,
    compile: bool | None = None,
    on_text: Callable[[str], object] = lambda _: None,
) -> list[Generation]:
    """Generate a text for each prompt, one after the other.

    Settings that are None are those of `model.generation_config`. A model trained by hqqtrain needs
    no more than this::

        model = hqqtrain.load_quantized("runs/mine")
        tokenizer = AutoTokenizer.from_pretrained("runs/mine/quantized")
        print(hqqtrain.generate(model, tokenizer, "What is a mutex?")[0].text)

    Args:
        model: A causal language model of transformers, quantized or not, with or without adapters.
            Its dtypes stay as they are.
        tokenizer: Its tokenizer.
        prompts: A text, the messages of a chat (dicts with `role` and `content`), or a list of
            these.
        chat: Whether a text is the message of a user, to be answered with the chat template, and
            not a beginning that is continued; None: whether the tokenizer has a chat template.
        system: The system message of chats that have none.
        max_new_tokens: Largest number of tokens of a text; None: until the model ends it, or until
            its context is full.
        temperature: Divides the logits; 0: the most likely token is always taken.
        top_k: Number of most likely tokens to choose from; 0: all.
        top_p: Choose from the most likely tokens that together have this probability.
        min_p: Choose from the tokens with at least this share of the highest probability.
        repetition_penalty: Above 1, tokens that occur in the text already become less likely.
        seed: With a seed, the same call generates the same texts; random numbers of the caller stay
            as they are.
        compile: Whether to compile the model for decoding, with a static cache; None: on a CUDA
            device. The first text then takes longer.
        on_text: Called with each piece of a text as soon as it is known.

    Returns:
        A `Generation` for each prompt.

    Raises:
        UserError: A prompt is empty or longer than the context, there is no chat template for a
            chat, or a setting is not allowed.
    """
    sampling = Sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    check_settings(asdict(sampling) | {"max_new_tokens": max_new_tokens, "seed": seed})
    generator = TextGenerator(
        model,
        tokenizer,
        sampling=sampling,
        chat=chat,
        system=system,
        max_new_tokens=max_new_tokens,
        compile=compile,
    )
    with seeded(seed, generator.device):
        return [generator.generate(prompt, on_text) for prompt in list_prompts(prompts)]


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Let random numbers on the CPU and on `device` begin with `seed`, and restore them afterwards.

    Without a seed, nothing changes.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and on again if it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _settings_of(model: Any, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation settings of `model`, which transformers would mix into `config`."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _translate_setting_errors() -> Iterator[None]:
    """Translate an error about the value of a setting that transformers refuses into UserError."""
    try:
        yield
    except (TypeError, ValueError) as error:
        file = traceback.extract_tb(error.__traceback__)[-1].filename.replace("\\", "/")
        if "/transformers/generation/" not in file:
            raise
        raise UserError(
            f"the settings of generate, or those in generation_config.json of the model: {error}"
        ) from error
