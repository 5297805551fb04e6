"""The parts of the base that are trained beside LoRA: small modules, and embeddings of new tokens.

PEFT trains copies of them: `modules_to_save` of whole modules, and `trainable_token_indices` of
single rows of the embeddings and the head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from hqqtrain.common.errors import UserError
from hqqtrain.nn.base_linears import BaseLinear
from hqqtrain.nn.hqq_linear import HQQLinear
from hqqtrain.nn.patterns import matching_modules


def modules_to_save(patterns: Sequence[str], model: PreTrainedModel) -> list[str]:
    """Return the full names of the modules that `adapter.modules_to_save` selects.

    Raises:
        UserError: A pattern matches nothing, or selects a module that cannot be trained in full.
    """
    key = "adapter.modules_to_save"
    modules = dict(model.named_modules())
    names = [name for name, module in modules.items() if name and list(module.parameters(False))]
    selected = matching_modules(key, patterns, names, "module with parameters")
    tied = model.all_tied_weights_keys
    tied_modules = {name.rpartition(".")[0] for name in (*tied, *tied.values())}
    for name in selected:
        if isinstance(modules[name], BaseLinear):
            kind = "quantized" if isinstance(modules[name], HQQLinear) else "a layer for adapters"
            raise UserError(
                f"{key}: {name} is {kind}, so it cannot be trained in full; add it to "
                f"quant.skip, as quant.skip=[lm_head,{name.rpartition('.')[2]}], or leave it to "
                "adapter.target_modules."
            )
        if name in tied_modules:
            raise UserError(
                f"{key}: the weight of {name} is tied to another module, and a trained copy would "
                "untie them; remove it. data.add_tokens trains the rows of new tokens of tied "
                "modules, too."
            )
        # PEFT selects every module whose name ends so, also in the middle of a word.
        others = [other for other in modules if other.endswith(name) and other not in selected]
        if others:
            raise UserError(
                f"{key}: with {name}, PEFT would also train {others[0]}, whose name ends so; "
                "select both, or none."
            )
    return selected


def trained_tokens(
    model: PreTrainedModel, ids: Sequence[int], trained_modules: Sequence[str]
) -> dict[str, list[int]]:
    """Return PEFT's `trainable_token_indices`: the rows to train of the embeddings and the head.

    Args:
        model: The model, with its quantized linears.
        ids: The ids of the tokens.
        trained_modules: Names of modules that are trained in full.

    Raises:
        UserError: PEFT cannot train rows of this model.
    """
    if not ids:
        return {}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    tied = model.all_tied_weights_keys
    fix = "set data.add_tokens=null, so that the markers are trained as ordinary text"
    is_plain = type(embeddings).forward is nn.Embedding.forward or hasattr(
        embeddings, "embed_scale"
    )
    if (
        not isinstance(embeddings, nn.Embedding)
        or not is_plain
        or _weight(embeddings, names) in tied
    ):
        raise UserError(
            f"data.add_tokens: PEFT cannot train rows of {type(embeddings).__name__}; {fix}."
        )
    modules = [names[embeddings]]
    if head is not None and names[head] not in trained_modules:
        name = names[head]
        if isinstance(head, BaseLinear):
            kind = "quantized" if isinstance(head, HQQLinear) else "a layer for adapters"
            raise UserError(
                f"data.add_tokens: {name} is {kind}, so its rows of new tokens cannot be "
                "trained; leave lm_head in quant.skip."
            )
        is_tied = _weight(head, names) in tied
        if type(head) is not nn.Linear or head.bias is not None:
            full = f"add adapter.modules_to_save=[{name.rpartition('.')[2]}], or "
            raise UserError(
                f"data.add_tokens: PEFT trains no rows of {name}, which is more than a weight; "
                f"{'' if is_tied else full}{fix}."
            )
        modules += [] if is_tied else [name]
    return {name: sorted(ids) for name in modules if name not in trained_modules}


def _weight(module: nn.Module, names: Mapping[nn.Module, str]) -> str:
    """Return the name of the weight of a module."""
    return f"{names[module]}.weight"


def set_tie_flag(model: PreTrainedModel) -> None:
    """Write into the configuration of `model` whether its head is tied to its embeddings.

    PEFT asks there whether the rows of the head follow those of the embeddings. A checkpoint may
    have its own values for a head that its config.json ties, and the configuration of a
    vision-language model may say it in a part that PEFT does not read.
    """
    head = model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    model.config.tie_word_embeddings = (
        head is not None and _weight(head, names) in model.all_tied_weights_keys
    )


def cast_trained_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the trained copies of `model` to `dtype`; they still compute in the model's dtype.

    PEFT casts single rows when it uses them. A whole module gets its input in `dtype`, and its
    output is cast back.
    """
    for module in model.modules():
        if isinstance(module, TrainableTokensWrapper):
            for param in module.token_adapter.trainable_tokens_delta.parameters():
                param.data = param.data.to(dtype)
        elif isinstance(module, ModulesToSaveWrapper):
            base = next(module.original_module.parameters()).dtype
            for copy in module.modules_to_save.values():
                copy.to(dtype)
                if dtype != base:
                    _compute_as(copy, base)


def _compute_as(module: nn.Module, dtype: torch.dtype) -> None:
    """Let `module` take inputs in the dtype of its parameters, and return outputs in `dtype`."""
    inner = next(module.parameters()).dtype

    def cast_inputs(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(arg.to(inner) if _is_float(arg) else arg for arg in args)

    def cast_output(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output.to(dtype) if _is_float(output) else output

    module.register_forward_pre_hook(cast_inputs)
    module.register_forward_hook(cast_output)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
