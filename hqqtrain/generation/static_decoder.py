"""Decode with one compiled step per token: the model, and the choice of the token, in a CUDA graph.

transformers' `generate` compiles the model alone. The rest of what it does for a token takes 2 ms
on the CPU, while a step of an 8B model at 4 bits takes 3 ms on an H200. Here a token stays on the
device until it is shown, and the next step is on its way by then.
"""

import logging
from collections.abc import Callable, Collection
from inspect import signature
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.compat import supports_static_cache
from hqqtrain.generation.static_cache import static_cache
from hqqtrain.generation.streamer import ReplyStreamer
from hqqtrain.generation.token_choice import (
    TokenChoice,
    choice_settings,
    unsupported_setting,
)
from hqqtrain.models.fqn import base_model
from hqqtrain.models.offload import has_host_weights

logger = logging.getLogger(__name__)

_PDL: dict[str, Any] = {"triton.enable_pdl": True}
"""Options of the compiler: its kernels start before the one ahead has ended, too (`supports_pdl`).

A step of an 8B model at 4 bits is 7 % faster with them (H200).
"""


_decoders: WeakKeyDictionary[nn.Module, "StaticDecoder"] = WeakKeyDictionary()
"""The newest decoder of each model, which later calls use again. It does not keep the model."""


def compiles(base: PreTrainedModel, device: torch.device, wanted: bool | None) -> bool:
    """Return whether to compile a model for decoding; see `TextGenerator`."""
    on_host, is_able = has_host_weights(base), supports_static_cache(base)
    if wanted and (on_host or not is_able):
        cannot = f"transformers' {type(base).__name__} cannot be compiled with a static cache"
        reason = "weights of the model stay in host memory" if on_host else cannot
        raise UserError(f"generate.compile=true: {reason}; use auto or false.")
    if wanted is None and on_host:
        logger.info("the model is not compiled, because weights of it stay in host memory")
    return device.type == "cuda" and is_able and not on_host if wanted is None else wanted


def static_decoder(
    model: nn.Module, config: GenerationConfig, cache_tokens: int
) -> "StaticDecoder | None":
    """Return a decoder for a model and its settings; None if only transformers can generate."""
    decoder = _decoders.pop(model, None)
    if decoder is None or not decoder.serves(model, config, cache_tokens):
        decoder = None  # its cache and its graph are freed
        obstacle = unsupported_setting(config)
        try:
            if obstacle is None:
                decoder = StaticDecoder(model, config, cache_tokens)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # also those of the compiler
            obstacle = (str(error) or repr(error)).splitlines()[0]
        if decoder is None:
            logger.info("transformers' own loop generates, which is slower: %s", obstacle)
            return None
    _decoders[model] = decoder
    return decoder


class StaticDecoder:
    """Generates texts with a model of transformers and a cache of a fixed size, one at a time.

    Args:
        model: A causal language model, or one with PEFT adapters, in evaluation mode.
        config: How tokens are chosen, and which tokens end a text.
        cache_tokens: Size of the cache: largest number of tokens of a prompt and its text.

    Raises:
        RuntimeError: The model cannot be compiled in this way.
    """

    def __init__(self, model: nn.Module, config: GenerationConfig, cache_tokens: int) -> None:
        base: Any = base_model(model)
        self._device = next(base.parameters()).device
        # The number of tokens in the cache, which is the position of the newest token.
        self._position = torch.zeros((), dtype=torch.long, device=self._device)
        self._cache = static_cache(base.config, cache_tokens, self._position)
        name = "cache" if "cache" in signature(base.forward).parameters else "past_key_values"
        self._cache_argument = {name: self._cache}
        self._cache_tokens, device = cache_tokens, self._device
        self._settings, self._state = choice_settings(config), _state(model)
        self._ends: Collection[int] = config.eos_token_id or ()
        self._token = torch.zeros(1, 1, dtype=torch.long, device=device)
        vocabulary = base.config.get_text_config(decoder=True).vocab_size
        self._choice = TokenChoice(config, vocabulary, device)
        self._in_use = Lock()
        self._step = self._compile(model)

    def serves(self, model: nn.Module, config: GenerationConfig, cache_tokens: int) -> bool:
        """Whether the compiled step is that of the model as it is now, and of these settings."""
        return (
            self._cache_tokens >= cache_tokens
            and self._settings == choice_settings(config)
            and self._state == _state(model)
        )

    @torch.no_grad()
    def generate(
        self, model: Any, input_ids: Tensor, max_new_tokens: int, streamer: ReplyStreamer
    ) -> None:
        """Generate the text that follows a prompt, and pass its tokens on to `streamer`.

        Args:
            model: The model.
            input_ids: The prompt, int64 [1, tokens]. The cache has room for it and the text.
            max_new_tokens: Largest number of tokens of the text.
            streamer: Receives the prompt and each token, and knows texts that end a reply.

        Raises:
            UserError: Another thread generates with the model, or a function that receives its
                text does.
        """
        if not self._in_use.acquire(blocking=False):
            raise UserError(
                "the model generates a text already, and compiled it generates one at a time; wait "
                "until it has ended, or use compile=False."
            )
        try:
            self._generate(model, input_ids, max_new_tokens, streamer)
        finally:
            self._in_use.release()

    def _generate(
        self, model: Any, input_ids: Tensor, max_new_tokens: int, streamer: ReplyStreamer
    ) -> None:
        streamer.put(input_ids)
        self._begin(model, input_ids)
        on_gpu = self._device.type == "cuda"
        arriving = self._read_token()
        for left in reversed(range(max_new_tokens)):
            token, ahead = arriving, on_gpu and left > 0
            if ahead:
                # The GPU computes the next token while the CPU looks at this one.
                self._step(model)
                arriving = self._read_token()
            streamer.put(value := token())
            if streamer.has_ended or value.item() in self._ends:
                break
            if not ahead and left > 0:
                self._step(model)
                arriving = self._read_token()
        streamer.end()

    def _begin(self, model: Any, input_ids: Tensor) -> None:
        """Compute the prompt, and choose the first token."""
        self._cache.reset()
        self._choice.begin(input_ids.to(self._device))
        positions = torch.arange(input_ids.shape[1], device=self._device)[None]
        output = model(
            input_ids=input_ids.to(self._device), position_ids=positions,
            use_cache=True, logits_to_keep=1, **self._cache_argument,
        )  # fmt: skip
        self._position.fill_(input_ids.shape[1])
        self._token.copy_(self._choice(output.logits[:, -1]))

    def _advance(self, model: Any) -> None:
        """Compute the token after the newest one."""
        output = model(
            input_ids=self._token, position_ids=self._position.view(1, 1), use_cache=True,
            **self._cache_argument,
        )  # fmt: skip
        self._position.add_(1)
        self._token.copy_(self._choice(output.logits[:, -1]))

    def _read_token(self) -> Callable[[], Tensor]:
        """Start to copy the newest token to the CPU; return a function that waits for it."""
        if self._device.type != "cuda":
            token = self._token.view(1).clone()
            return lambda: token
        host = torch.empty(1, dtype=torch.long, pin_memory=True)
        host.copy_(self._token.view(1), non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait

    @torch.no_grad()
    def _compile(self, model: nn.Module) -> Callable[[Any], object]:
        """Compile the step, and return it. On a GPU it replays a CUDA graph."""
        on_gpu = self._device.type == "cuda"
        step = torch.compile(
            self._advance, fullgraph=True, dynamic=False, options=_PDL if on_gpu else None
        )
        with torch.random.fork_rng(devices=[self._device] if on_gpu else []):
            self._begin(model, torch.zeros(1, 1, dtype=torch.long))
            if not on_gpu:
                step(model)
                return step
            with torch.cuda.device(self._device):
                graph = _recorded(lambda: step(model))
        return lambda _: graph.replay()


def _recorded(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Run a step on the current CUDA device, which compiles it, and record it as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        step()  # what is allocated at first use exists by now
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def _state(model: nn.Module) -> list[object]:
    """Return all that a recorded step depends on: where tensors are, and which adapters are on."""
    state: list[object] = [
        (tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers())
    ]
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            adapters = list(module.active_adapters), list(module.merged_adapters)
            scaling = dict(getattr(module, "scaling", {}))
            state.append((adapters, module.disable_adapters, scaling))
    return state
