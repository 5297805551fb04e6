"""The private parts of other libraries that hqqtrain needs, each under a public name.

Any release of PyTorch, PEFT, transformers or DeepSpeed may change them without notice. This file
has all of them, and `tests/test_compat.py` uses each of them with the installed library. Only
PyTorch is imported; callers pass the objects of the other libraries.
"""

import re
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.fsdp._common_utils import _is_fsdp_flattened
from torch.nn.parallel import DistributedDataParallel

# PyTorch

default_store = _get_default_store
"""Return the store of the default process group, through which ranks exchange heartbeats.

PyTorch has no public way to get the store that a launcher has made.
"""

_STORE_MODULES = (
    "torch.distributed.rendezvous", "torch.distributed.elastic.rendezvous.static_tcp_rendezvous",
)  # fmt: skip
"""Modules that create the store; `torch.distributed.rendezvous` is also a function's name."""


def replace_tcp_store(make_store: Callable[..., torch.distributed.TCPStore]) -> None:
    """Let torch's `env://` initialization and torchrun call `make_store` in place of `TCPStore`.

    Neither has a setting for the address on which the server of the store listens.
    """
    for name in _STORE_MODULES:
        module: Any = import_module(name)
        assert module.TCPStore, name
        module.TCPStore = make_store


is_fsdp1_flattened = _is_fsdp_flattened
"""Whether FSDP1 has flattened a parameter, so that it is a view into a shard of its layer.

FSDP1 marks such parameters with an attribute that only this function reads.
"""

WRAPPER_NAMES = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
"""Parts of fully qualified names that torch.compile, activation checkpointing and FSDP1 add.

PyTorch removes them from the names in its own state dicts, but has no public list of them.
"""


copy_tensors = torch._foreach_copy_
"""Copy each tensor of the second list into that of the first: one launch for all, with a cast.

PyTorch's own optimizers and FSDP2 call it, but it has no public name.
"""

keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Whether the running backward pass keeps the saved tensors, as `retain_graph=True` asks."""


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of `module` runs a hook; `nn.Module` has no public way to ask."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `module` itself that a checkpoint contains, by name.

    `nn.Module` has no public way to tell them from the others without building a state dict, in
    which other libraries' hooks rename and add entries.
    """
    omitted = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in _direct_buffers(module) if name not in omitted}


def non_persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of `module` itself that no checkpoint contains, by name."""
    omitted = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in _direct_buffers(module) if name in omitted}


def _direct_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    return list(module.named_buffers(recurse=False, remove_duplicate=False))


def pack_int4(codes: Tensor) -> Tensor:
    """Arrange 4-bit codes, uint8 [rows, columns], for `int4_product`.

    Args:
        codes: Its rows are a multiple of 16, and its columns one of 32.
    """
    if codes.device.type == "cpu":
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
    pairs = codes[:, ::2] << 4 | codes[:, 1::2]
    return torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles)


def int4_product(x: Tensor, packed: Tensor, group_size: int, scale_and_shift: Tensor) -> Tensor:
    """Compute x W^T [rows of x, rows of W] with W = (codes - 8) * scale + shift.

    PyTorch has public kernels for 8 bits alone; torchao and hqq use these, too.

    Args:
        x: [rows, columns of W], bf16.
        packed: The codes, from `pack_int4`.
        group_size: 32, 64, 128 or 256.
        scale_and_shift: [groups of a row, rows of W, 2], in the dtype of x.
    """
    aten = torch.ops.aten
    on_cpu = x.device.type == "cpu"
    product = aten._weight_int4pack_mm_for_cpu if on_cpu else aten._weight_int4pack_mm
    return product(x, packed, group_size, scale_and_shift)


def ignore_under_ddp(model: nn.Module, names: Iterable[str]) -> None:
    """Let DDP leave out some parameters of `model`, by name.

    DDP refuses frozen parameters on another kind of device than the trained ones. Its method for
    this is documented, but private.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(names))


# PEFT


def add_lora_dispatcher(lora_model: Any, dispatch: Callable[..., nn.Module | None]) -> None:
    """Let PEFT ask `dispatch` for the LoRA layer of a module before it asks its own dispatchers.

    A `LoraConfig` knows other layers only if they are registered with it, and a configuration that
    PEFT has read from a file has nothing registered.

    Args:
        lora_model: PEFT's module `peft.tuners.lora.model`, changed in place.
        dispatch: Called like `dispatch_hqq` of that module. It returns a layer, or None.
    """
    original = lora_model.dispatch_hqq

    def dispatch_first(
        target: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> nn.Module | None:
        layer = dispatch(target, adapter_name, config, **kwargs)
        if layer is None:
            layer = original(target, adapter_name, config=config, **kwargs)
        return layer

    lora_model.dispatch_hqq = dispatch_first


def extend_all_linear(tuners_utils: Any, is_linear: Callable[[nn.Module], bool]) -> None:
    """Let `target_modules="all-linear"` of PEFT select other modules than `nn.Linear`, too.

    Args:
        tuners_utils: PEFT's module `peft.tuners.tuners_utils`, changed in place.
        is_linear: Whether a module is such a linear. The head of the model is never selected.
    """
    original = tuners_utils._maybe_include_all_linear_layers

    def include(peft_config: Any, model: Any) -> Any:
        wanted = getattr(peft_config, "target_modules", None)
        peft_config = original(peft_config, model)
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            get_head = getattr(model, "get_output_embeddings", lambda: None)
            head = get_head()
            peft_config.target_modules |= {
                name
                for name, module in model.named_modules()
                if is_linear(module) and module is not head
            }
        return peft_config

    tuners_utils._maybe_include_all_linear_layers = include


# transformers


def ignore_unexpected_tensors(model: Any, names: Iterable[str]) -> None:
    """Let `from_pretrained` report no tensor of these names that only the checkpoint has.

    Args:
        model: The model that is about to be loaded.
        names: Names in the checkpoint.
    """
    known = model._keys_to_ignore_on_load_unexpected
    patterns = [*(known or ()), *(f"^{re.escape(name)}$" for name in names)]
    # transformers adds a list to it in 5.0, and a set in 5.17.
    model._keys_to_ignore_on_load_unexpected = set(patterns) if type(known) is set else patterns


CHECKPOINT_ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""Whether a module of transformers recomputes, and the function that it calls if it does."""


def lets_inputs_require_grads(model: Any) -> bool:
    """Whether `enable_input_require_grads` of transformers was called, and not undone."""
    return hasattr(model, "_require_grads_hook")


def replace_checkpoint_function(model: nn.Module, function: Callable[..., Any]) -> int:
    """Let checkpointed layers call `function(forward, *inputs)` in place of torch's `checkpoint`.

    transformers chooses the function itself; its public settings are `checkpoint`'s arguments.

    Args:
        model: A transformers model after `gradient_checkpointing_enable`.
        function: Runs `forward` on `inputs` and returns its output.

    Returns: The number of modules that now call `function`.
    """
    name = CHECKPOINT_ATTRIBUTES[1]
    for layer in (layers := [m for m in model.modules() if hasattr(m, name)]):
        setattr(layer, name, function)
    return len(layers)


def attn_implementation(config: Any) -> str | None:
    """Return the attention that a model uses, as `set_attn_implementation` names it."""
    return getattr(config, "_attn_implementation", None)


def can_set_attention(model: Any) -> bool:
    """Whether a model takes its attention from `AttentionInterface`.

    Otherwise `set_attn_implementation` changes nothing and logs a warning.
    """
    return bool(model._can_set_attn_implementation())


def supports_static_cache(model: Any) -> bool:
    """Whether `generate` of transformers can compile a model, with a cache of a fixed size.

    transformers marks its models, and compiles without asking the caller.
    """
    return bool(getattr(model, "_can_compile_fullgraph", False))


def compile_on_every_device(config: Any) -> Any:
    """Let transformers' `CompileConfig` compile on a CPU, too; return it."""
    config._compile_all_devices = True
    return config


def implementations(config: Any) -> tuple[str | None, str | None]:
    """Return the attention and the experts implementation that a configuration of a model names.

    transformers reads both from config.json. Its public property for the attention answers "eager"
    also where config.json names nothing.
    """
    return attn_implementation(config), getattr(config, "_experts_implementation", None)


# DeepSpeed's ZeRO-3


def zero3_shard(param: Tensor) -> Tensor | None:
    """Return this rank's flat shard of `param`, padding included; None if it is not sharded.

    DeepSpeed's public functions return fp32 copies of trained parameters only.
    """
    return getattr(param, "ds_tensor", None)


def zero3_shape(param: Any) -> torch.Size:
    """Return the full shape of a parameter that ZeRO-3 has sharded; its own shape is empty."""
    return param.ds_shape


def zero3_flat_parameters(engine: Any) -> list[Tensor]:
    """Return the flat fp32 tensors that the inner optimizer of a DeepSpeed engine steps on.

    Optimizer state is loaded for them. DeepSpeed's public way reads its own checkpoints only.
    """
    return engine.optimizer.fp32_partitioned_groups_flat


def zero3_inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the optimizer that the engine was given, which steps on the flat tensors."""
    return engine.optimizer.optimizer


def disable_deepspeed_shared_memory(deepspeed: Any) -> None:
    """Keep DeepSpeed from compiling its own all-reduce for processes on the same CPU.

    The compilation needs a C++ compiler. Training does not need this all-reduce, but DeepSpeed has
    no setting that turns it off at run time.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
