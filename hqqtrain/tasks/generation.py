"""The task `generate`: answer prompts, or chat on the terminal. It writes no run directory.

Standard output gets the texts alone, so that it can be piped. Everything else is on standard error.
"""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from hqqtrain.common.text import format_bytes
from hqqtrain.config.quant import QuantConfig
from hqqtrain.formats.companions import GENERATION_CONFIG
from hqqtrain.generation.generator import TextGenerator, seeded
from hqqtrain.generation.settings import Sampling, read_generation_config
from hqqtrain.inference.prepare import prepare_for_inference
from hqqtrain.loading.memory_check import free_host_memory
from hqqtrain.loading.model_builder import wrap_for_execution
from hqqtrain.loading.plan import ModelPlan, plan_model
from hqqtrain.models.fqn import base_model
from hqqtrain.models.source import resolve_source
from hqqtrain.models.tokenizer import load_tokenizer
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.lora import cast_adapters
from hqqtrain.nn.replace import dequantize_linears
from hqqtrain.tasks.calibration import load_calibration
from hqqtrain.tasks.chat import TerminalChat
from hqqtrain.tasks.context import Run
from hqqtrain.tasks.inference_backend import errors_name_the_key, inference_backend
from hqqtrain.tasks.model import check_fits_run, load_source, plan_settings
from hqqtrain.tasks.prompts import PlacedPrompt, read_prompts
from hqqtrain.tasks.replies import Replies
from hqqtrain.tracking.console import Console

logger = logging.getLogger(__name__)


def generate_texts(run: Run) -> None:
    """Answer the prompts of the run, or those that a user types on the terminal.

    Raises:
        UserError: A prompt, a file or the model has a fault.
    """
    settings, console = run.config.generate, run.recorder.console
    prompts, replies = read_prompts(settings), Replies(settings.output)
    generator = load_generator(run)
    try:
        with seeded(settings.seed, generator.device):
            if prompts is None:
                TerminalChat(generator, console, replies).run()
            else:
                _answer(prompts, generator, console, replies)
    except BrokenPipeError:  # `... | head -1`: the reader has seen enough
        _close_output()
    finally:
        replies.write()
        if speed := replies.describe_speed():
            logger.info("%s%s", speed, ", with compilation" if generator.compiles else "")


def _close_output() -> None:
    """Let Python's last flush of standard output, which nobody reads, go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def load_generator(run: Run) -> TextGenerator:
    """Load the model of the run, quantized first if the settings say so, and its tokenizer.

    Raises:
        UserError: The model has a fault, does not fit, or lacks what the settings need.
    """
    settings, dtype = run.config.generate, run.runtime.dtype
    if settings.use == "auto" and resolve_source(run.config.model).kind == "quantized":
        # Until it is downloaded, a model on the hub may be dense.
        run = replace(run, config=replace(run.config, quant=_enabled(run.config.quant)))
    plan = plan_model(plan_settings(run.config), run.runtime)
    backend = inference_backend(run)
    check_fits_run(run, plan)
    loaded = load_source(run, plan, load_calibration(run, plan))
    cast_adapters(loaded.model, dtype)
    on_cpu = run.runtime.device.type == "cpu"
    if backend or not on_cpu:
        with errors_name_the_key():
            prepare_for_inference(loaded.model, backend.name if backend else "auto")
    if on_cpu:
        _dequantize_if_it_fits(loaded.model)
    model = wrap_for_execution(loaded, run.runtime.strategy).model
    base = base_model(model)
    if file := _generation_config_file(plan):
        base.generation_config = read_generation_config(file)
    return TextGenerator(
        model,
        load_tokenizer(plan.source.tokenizer),
        sampling=Sampling(
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            min_p=settings.min_p,
            repetition_penalty=settings.repetition_penalty,
        ),
        chat=_as_flag(settings.chat),
        system=settings.system,
        max_new_tokens=settings.max_new_tokens,
        compile=_as_flag(settings.compile),
    )


def _dequantize_if_it_fits(model: nn.Module) -> None:
    """Dequantize the weights once, because a CPU would do so for every token; the same numbers."""
    layers = [module for module in model.modules() if isinstance(module, HQQLinear)]
    size = sum(m.in_features * m.out_features * m.compute_dtype.itemsize for m in layers)
    if layers and size < free_host_memory() / 2:
        dequantize_linears(model)
        logger.info(
            "the CPU has no kernels for packed weights: they are dequantized once, into %s",
            format_bytes(size),
        )


def _enabled(quant: QuantConfig) -> QuantConfig:
    """Return settings that accept a quantized model, which keeps its own."""
    return quant if quant.quantizes else QuantConfig()


def _as_flag(value: Any) -> bool | None:
    return None if value == "auto" else bool(value)


def _generation_config_file(plan: ModelPlan) -> Path | None:
    """Return the file with the settings of the adapter, or else of the model, if there is one."""
    folders = [plan.source.path]
    if plan.initial_adapter:
        folders.insert(0, plan.initial_adapter.folder)
    files = (folder / GENERATION_CONFIG for folder in folders)
    return next((file for file in files if file.is_file()), None)


def _answer(
    prompts: Sequence[PlacedPrompt], generator: TextGenerator, console: Console, replies: Replies
) -> None:
    """Write the reply to each prompt to standard output, with an empty line between two."""
    for prompt in prompts:  # all faults are found before the first reply
        with prompt.errors():
            generator.prompts.encode(prompt.content)
    is_chat = generator.prompts.is_chat
    for number, prompt in enumerate(prompts, start=1):
        if len(prompts) > 1:
            console.stream_text("\n" if number > 1 else "")
            logger.info("%s:", prompt.place)
        with prompt.errors():
            generation = generator.generate(prompt.content, console.stream_text)
        console.stream_text("\n")
        replies.count_tokens(generation)
        if is_chat:
            messages = generator.prompts.messages(prompt.content)
            answer = {"role": "assistant", "content": generation.text}
            replies.keep({"messages": [*messages, answer]})
        else:
            replies.keep({"prompt": prompt.content, "completion": generation.text})
        if is_chat and not generation.is_complete:
            logger.info(
                "(the reply was cut off at generate.max_new_tokens, or because the context is full)"
            )
