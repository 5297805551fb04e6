"""Check that a planned model can be trained or evaluated as a causal language model.

Each check needs only the model on the meta device and the headers of the checkpoint, so a fault is
found before any weight is quantized.
"""

import logging
from collections.abc import Sequence, Set

from torch import nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.config.eval_protocols import JOINED_PROTOCOLS, WINDOWS
from hqqtrain.config.groups import EvalConfig
from hqqtrain.models.families.positions import shortest_position_table
from hqqtrain.models.families.structure import checkpointed_layers, text_config
from hqqtrain.models.fqn import base_model, base_tensors, is_packed
from hqqtrain.models.weight_access import without_numbers
from hqqtrain.models.weights.safetensors import SafetensorsReader
from hqqtrain.models.weights.synthetic import SyntheticReader
from hqqtrain.nn.base_linears import base_linears
from hqqtrain.nn.replace import skip_argument

logger = logging.getLogger(__name__)


def check_runnable(
    model: nn.Module,
    max_seq_len: int,
    *,
    activation_checkpointing: str | int = "none",
    evaluation: EvalConfig | None = None,
) -> None:
    """Check that sequences of `max_seq_len` tokens can be run through the model.

    The function logs a warning if they are longer than those that the model was made for.

    Args:
        model: The model, on any device.
        max_seq_len: `train.max_seq_len`.
        activation_checkpointing: `train.activation_checkpointing` if the model is trained.
        evaluation: The group `eval`, whose windows are checked, too.

    Raises:
        UserError: A token has no position, the windows of `eval.protocol` are longer than the model
            was made for, or the model does not support activation checkpointing.
    """
    _check_positions(model, max_seq_len)
    if evaluation:
        _check_eval_positions(model, evaluation)
    root = base_model(model)
    _check_checkpointing(root, activation_checkpointing)
    max_positions = getattr(text_config(model), "max_position_embeddings", None)
    if max_positions and max_seq_len > max_positions:
        logger.warning(
            "train.max_seq_len=%d: the model was made for %d tokens at most, and its perplexity on "
            "longer sequences means little; use train.max_seq_len=%d or less",
            max_seq_len,
            max_positions,
            max_positions,
        )


def _check_checkpointing(model: PreTrainedModel, mode: str | int) -> None:
    """Check that the decoder layers can recompute as `mode` says; `auto` may need none of them.

    Raises:
        UserError: They cannot.
    """
    key, class_name = f"train.activation_checkpointing={mode}", type(model).__name__
    if mode not in ("auto", "none") and not model.supports_gradient_checkpointing:
        raise UserError(
            f"{key}: transformers' {class_name} does not support it; set "
            "train.activation_checkpointing=none."
        )
    if not isinstance(mode, int):
        return
    num_layers = len(checkpointed_layers(model))
    if not num_layers:
        raise UserError(
            f"{key}: the layers of transformers' {class_name} recompute together or not at all; "
            "use full or none."
        )
    if mode > num_layers:
        raise UserError(f"{key}: the model has {num_layers} decoder layers; use at most as many.")


def _check_eval_positions(model: nn.Module, evaluation: EvalConfig) -> None:
    """Check that the model was made for the windows of `eval.protocol`, if it gives their length.

    Raises:
        UserError: The windows are longer. Their perplexity would tell nothing about the model.
    """
    protocol = JOINED_PROTOCOLS.get(evaluation.protocol)
    if protocol is None or evaluation.source is None:
        return
    table = shortest_position_table(model)
    limits = (getattr(text_config(model), "max_position_embeddings", None), table and table[1])
    longest = min((limit for limit in limits if limit), default=protocol.context)
    if protocol.context > longest:
        fitting = [name for name, each in JOINED_PROTOCOLS.items() if each.context <= longest]
        raise UserError(
            f"eval.protocol={evaluation.protocol}: measures windows of {protocol.context} tokens, "
            f"but the model was made for {longest} tokens at most (max_position_embeddings); use "
            f"eval.protocol={' or '.join([WINDOWS, *fitting])}."
        )


def _check_positions(model: nn.Module, max_seq_len: int) -> None:
    """Check that the model has a position for each token of a sequence.

    Raises:
        UserError: A table of positions is shorter than `max_seq_len`.
    """
    table = shortest_position_table(model)
    if table is not None and max_seq_len > table[1]:
        name, length = table
        raise UserError(
            f"train.max_seq_len={max_seq_len}: the model has a table of positions, {name}, for "
            f"{length} tokens; use train.max_seq_len={length} or less."
        )


def check_called_linears(model: nn.Module, read_linears: Set[str], skip: Sequence[str]) -> None:
    """Check that the code of the model calls all base linears, and does not read their weight.

    Args:
        model: The model, with its base linears in place.
        read_linears: As in `PackingProbe`.
        skip: `quant.skip`.

    Raises:
        UserError: It reads the weight of a base linear.
    """
    read = [name for name in base_linears(model) if without_numbers(name) in read_linears]
    if read:
        endings = dict.fromkeys(f"*.{name.rpartition('.')[2]}" for name in read)
        raise UserError(
            f"quant.skip={list(skip)}: transformers' {type(base_model(model)).__name__} reads the "
            f"weight of {read[0]} without calling the layer, so it cannot be quantized or adapted; "
            f"quantize with {skip_argument([*skip, *endings])}."
        )


def check_stored_dtypes(
    model: nn.Module, reader: SafetensorsReader | SyntheticReader, unused: list[str]
) -> None:
    """Check that a checkpoint has floating-point weights, without scales of their own.

    Args:
        model: The model on meta. If the checkpoint is dense, no linear is quantized yet.
        reader: Reads the checkpoint.
        unused: Names of the tensors of the checkpoint that the model does not have.

    Raises:
        UserError: A weight is stored as integers, or in 8 bits with a scale that is not applied.
    """
    if isinstance(reader, SyntheticReader):
        return
    for name, module, attribute, tensor in base_tensors(model):
        if is_packed(module, attribute) or not tensor.is_floating_point():
            continue
        if not reader.dtype(name).is_floating_point:
            raise UserError(
                f"{reader.folder}: {name} is stored as {reader.dtype(name)}. These are not "
                "full-precision weights; use the model that they were made from."
            )
    scale = next((name for name in unused if "scale" in name.rpartition(".")[2]), None)
    if scale is not None and reader.has_8_bit_floats:
        raise UserError(
            f"{reader.folder}: contains 8-bit floating-point weights and scales for them, such as "
            f"{scale}. They are quantized already; use the model that they were made from."
        )
