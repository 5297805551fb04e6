"""Each private part of another library still does what hqqtrain needs it for.

A failure here means that a new release changed it: the message names what to look at. Mend
`hqqtrain/compat.py` so that it works with all releases in the range of pyproject.toml, or narrow
the range. An ImportError names an alias that is gone: see its entry in `ADVICE`.
"""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ranks import CPU
from torch import nn
from torch.distributed import (
    HashStore,
    destroy_process_group,
    init_process_group,
    is_initialized,
)
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from hqqtrain import compat
from hqqtrain.distributed.strategies import zero3

_ZERO3 = "needed to save and load training state by name; deepspeed.utils.safe_get_* are public"
ADVICE = {
    "default_store": "needed for heartbeats; pass a store of our own to init_process_group",
    "replace_tcp_store": "needed to let the store listen on one address; look for an argument of "
    "torchrun and of init_process_group, or pass a store of our own",
    "is_fsdp1_flattened": "needed to know sharded parameters; look at FSDP.state_dict_type",
    "WRAPPER_NAMES": "needed for names on disk; look at torch's get_model_state_dict",
    "copy_tensors": "needed to cast adapters at once; copy them one by one",
    "keeps_graph": "needed to reuse saved memory in a backward pass; always allocate",
    "has_hooks": "needed to know whether a module may be left out; look at nn.Module",
    "persistent_buffers": "needed to name the tensors of a checkpoint; compare with state_dict()",
    "non_persistent_buffers": "needed to compute inv_freq again; compare with state_dict()",
    "pack_int4": "needed for quant.backend=torchao; look at torchao's tile-packed 4-bit tensors",
    "int4_product": "needed for quant.backend=torchao; look at torchao's tile-packed 4-bit tensors",
    "ignore_under_ddp": "needed for quant.offload_meta under ddp; look at how DDP checks devices",
    "add_lora_dispatcher": "needed for LoRA on HQQLinear; look at PEFT's page on custom models",
    "extend_all_linear": "needed for target_modules=all-linear; look at PEFT's inject_adapter",
    "ignore_unexpected_tensors": "needed to load quantized folders without warnings; look at "
    "from_pretrained",
    "CHECKPOINT_ATTRIBUTES": "needed to restore a model that was trained; look at "
    "_set_gradient_checkpointing",
    "replace_checkpoint_function": "needed to offload activations; look at "
    "gradient_checkpointing_enable, which chooses the function",
    "lets_inputs_require_grads": "needed to restore a model that was trained; look at "
    "enable_input_require_grads",
    "implementations": "needed to refuse code of the hub; look at from_config's arguments",
    "attn_implementation": "needed to replace sdpa alone; look at set_attn_implementation",
    "can_set_attention": "needed to prevent a warning; look at set_attn_implementation",
    "supports_static_cache": "needed to compile only what can be; look at GenerationMixin",
    "compile_on_every_device": "needed for generate.compile=true on a CPU; look at CompileConfig",
    "zero3_shard": _ZERO3,
    "zero3_shape": _ZERO3,
    "zero3_flat_parameters": _ZERO3,
    "zero3_inner_optimizer": _ZERO3,
    "disable_deepspeed_shared_memory": "needed where no compiler is; look at deepspeed.comm",
}


@contextmanager
def advised(name: str) -> Iterator[None]:
    """Add the advice for `name` to an error in the context."""
    try:
        yield
    except Exception as error:
        error.add_note(f"hqqtrain.compat.{name}: {ADVICE[name]}")
        raise


@pytest.fixture
def one_rank() -> Iterator[HashStore]:
    if is_initialized():  # FSDP2 in a test of this process has made a group, which it keeps
        destroy_process_group()
    store = HashStore()
    init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    destroy_process_group()


def test_everything_has_advice():
    tree = ast.parse(Path(compat.__file__).read_text("utf-8"))
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    aliases = {ast.unparse(node.targets[0]) for node in tree.body if isinstance(node, ast.Assign)}
    assert {name for name in functions | aliases if not name.startswith("_")} == ADVICE.keys()


def test_the_default_store_is_shared_and_can_be_cloned(one_rank: HashStore):
    with advised("default_store"):
        compat.default_store().clone().set("key", "value")
        assert compat.default_store().get("key") == b"value"


def test_ranks_and_torchrun_make_their_store_by_our_function(monkeypatch: pytest.MonkeyPatch):
    made = []
    modules = [import_module(name) for name in compat._STORE_MODULES]
    for module in modules:
        monkeypatch.setattr(module, "TCPStore", module.TCPStore)  # restored after the test
    with advised("replace_tcp_store"):
        compat.replace_tcp_store(
            lambda *args, **options: made.append(args or options) or HashStore()
        )
        modules[0]._create_c10d_store("127.0.0.1", 1, 0, 1, timedelta(seconds=1))
        handler = modules[1].StaticTCPRendezvous("127.0.0.1", 1, 0, 1, "id", 1)
        handler.next_rendezvous()
        assert len(made) == 2


def test_fsdp1_marks_what_it_flattens(one_rank: HashStore):
    plain, wrapped = nn.Linear(3, 2), nn.Linear(3, 2)
    wrapped = FullyShardedDataParallel(wrapped, use_orig_params=True, device_id=CPU)
    with advised("is_fsdp1_flattened"):
        assert not any(map(compat.is_fsdp1_flattened, plain.parameters()))
        assert all(map(compat.is_fsdp1_flattened, wrapped.parameters()))


def test_ddp_leaves_parameters_on_another_device_out(one_rank: HashStore):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3, device="meta").requires_grad_(False))
    with advised("ignore_under_ddp"):
        with pytest.raises(ValueError, match="same type of devices"):
            DistributedDataParallel(model)
        compat.ignore_under_ddp(model, ["1.weight", "1.bias"])
        DistributedDataParallel(model, init_sync=False)


def test_wrappers_add_known_parts_to_names(one_rank: HashStore):
    compiled = torch.compile(nn.Linear(3, 2))
    checkpointed = checkpoint_wrapper(nn.Linear(3, 2))
    flat = FullyShardedDataParallel(nn.Linear(3, 2), use_orig_params=True, device_id=CPU)
    with advised("WRAPPER_NAMES"):
        # checkpoint_wrapper hides its part from named_parameters, but not from named_modules.
        names = {n for m in (compiled, checkpointed, flat) for n, _ in m.named_modules() if n}
        assert names == compat.WRAPPER_NAMES


def test_buffers_are_split_as_in_a_state_dict():
    module = nn.BatchNorm1d(3)
    module.register_buffer("angles", torch.ones(2), persistent=False)
    module.register_buffer("absent", None, persistent=False)
    with advised("persistent_buffers"):
        kept = compat.persistent_buffers(module)
        assert kept.keys() == module.state_dict().keys() - {"weight", "bias"}
        assert kept["running_mean"] is module.running_mean
    with advised("non_persistent_buffers"):
        assert compat.non_persistent_buffers(nn.Sequential(module)) == {}
        ((name, buffer),) = compat.non_persistent_buffers(module).items()
        assert name == "angles"
        assert buffer is module.angles


def test_tensors_are_copied_together_with_a_cast():
    copies, sources = [torch.zeros(2, 3), torch.zeros(4, dtype=torch.bfloat16)], [torch.ones(2, 3)]
    with advised("copy_tensors"):
        compat.copy_tensors(copies, [*sources, torch.full((4,), 0.5, dtype=torch.float64)])
        assert [copy.unique().item() for copy in copies] == [1, 0.5]


def test_a_backward_pass_knows_whether_its_graph_is_kept():
    seen: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.register_hook(lambda _: seen.append(compat.keeps_graph()))
    with advised("keeps_graph"):
        y.sum().backward(retain_graph=True)
        y.sum().backward()
        assert seen == [True, False]


def test_a_module_has_hooks_until_they_are_removed():
    with advised("has_hooks"):
        for register in ("forward_hook", "forward_pre_hook", "full_backward_hook"):
            module = nn.Linear(2, 2)
            assert not compat.has_hooks(module)
            handle = getattr(module, f"register_{register}")(lambda *_: None)
            assert compat.has_hooks(module)
            handle.remove()
            assert not compat.has_hooks(module)


class Scaled(nn.Module):
    """A layer that PEFT does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 4
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class ScaledLora(peft.tuners.lora.layer.Linear):
    """PEFT's layer around it."""


def test_int4_products_are_those_of_the_codes():
    codes = torch.arange(16 * 32, dtype=torch.uint8).view(16, 32) % 16
    scale_and_shift = torch.tensor([2.0, 3.0]).bfloat16().expand(1, 16, 2).contiguous()
    x = torch.eye(32).bfloat16()
    with advised("pack_int4"):
        packed = compat.pack_int4(codes)
    with advised("int4_product"):
        product = compat.int4_product(x, packed, 32, scale_and_shift)
        assert torch.equal(product.t(), ((codes.float() - 8) * 2 + 3).bfloat16())


def test_peft_wraps_a_layer_that_it_does_not_know(monkeypatch: pytest.MonkeyPatch):
    lora_model = import_module("peft.tuners.lora.model")
    monkeypatch.setattr(lora_model, "dispatch_hqq", lora_model.dispatch_hqq)  # restored afterwards
    with advised("add_lora_dispatcher"):
        compat.add_lora_dispatcher(
            lora_model,
            lambda target, *more, **kwargs: (
                ScaledLora(target, *more, **kwargs) if isinstance(target, Scaled) else None
            ),
        )
        config = peft.LoraConfig(target_modules=["0", "1"], init_lora_weights=False)
        model = peft.get_peft_model(nn.Sequential(Scaled(), nn.Linear(4, 4)), config)
        assert type(model.base_model.model[0]) is ScaledLora
        assert type(model.base_model.model[1]) is peft.tuners.lora.layer.Linear


def test_all_linear_selects_a_layer_that_peft_does_not_know(monkeypatch: pytest.MonkeyPatch):
    tuners_utils = import_module("peft.tuners.tuners_utils")
    name = "_maybe_include_all_linear_layers"
    monkeypatch.setattr(tuners_utils, name, getattr(tuners_utils, name))
    with advised("extend_all_linear"):
        compat.extend_all_linear(tuners_utils, lambda module: isinstance(module, Scaled))
        for targets, found in (("all-linear", {"0", "1"}), (["1"], {"1"})):
            config = peft.LoraConfig(target_modules=targets)
            included = getattr(tuners_utils, name)(config, nn.Sequential(Scaled(), nn.Linear(4, 4)))
            assert set(included.target_modules) == found


def test_transformers_knows_the_tensors_to_ignore():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    with advised("ignore_unexpected_tensors"):
        compat.ignore_unexpected_tensors(model, ["a.weight"])
        patterns = model._keys_to_ignore_on_load_unexpected
        assert "^a\\.weight$" in patterns


def test_every_decoder_layer_calls_the_checkpoint_function():
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2
    )
    model, calls = LlamaForCausalLM(config).train(), []

    def function(forward: Any, *inputs: torch.Tensor, **more: Any) -> Any:
        calls.append(inputs[0].shape)
        return forward(*inputs, **more)

    with advised("replace_checkpoint_function"):
        assert compat.replace_checkpoint_function(model, function) == 0
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert compat.replace_checkpoint_function(model, function) >= 3
        with advised("CHECKPOINT_ATTRIBUTES"):
            layer = vars(model.model.layers[0])
            assert [layer[name] for name in compat.CHECKPOINT_ATTRIBUTES] == [True, function]
        model(input_ids=torch.arange(5)[None], use_cache=False)
        assert calls == [(1, 5, 8)] * 3


def test_models_know_whether_their_inputs_require_gradients():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                    num_attention_heads=1)
    )  # fmt: skip
    with advised("lets_inputs_require_grads"):
        assert not compat.lets_inputs_require_grads(model)
        model.enable_input_require_grads()
        assert compat.lets_inputs_require_grads(model)
        model.disable_input_require_grads()
        assert not compat.lets_inputs_require_grads(model)


def test_a_configuration_knows_the_implementations_that_it_names():
    with advised("implementations"):
        assert compat.implementations(LlamaConfig()) == (None, None)
        named = LlamaConfig(attn_implementation="flash_attention_2", experts_implementation="eager")
        assert compat.implementations(named) == ("flash_attention_2", "eager")


def test_generate_compiles_models_that_transformers_has_marked():
    config = CompileConfig(backend="eager")
    small = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    with torch.random.fork_rng():
        model = LlamaForCausalLM(LlamaConfig(**small, num_hidden_layers=1, eos_token_id=None))
    with advised("attn_implementation"):
        model.set_attn_implementation("eager")
        assert compat.attn_implementation(model.config) == "eager"
        model.set_attn_implementation("sdpa")
        assert compat.attn_implementation(model.config) == "sdpa"
    with advised("can_set_attention"):
        assert compat.can_set_attention(model)
    with advised("supports_static_cache"):
        assert compat.supports_static_cache(model)
        assert not compat.supports_static_cache(nn.Linear(1, 1))
    with advised("compile_on_every_device"):
        settings = {"cache_implementation": "static", "max_new_tokens": 2, "compile_config": config}
        tokens = torch.ones(1, 2, dtype=torch.long)
        assert compat.compile_on_every_device(config) is config
        model.generate(tokens, attention_mask=tokens, pad_token_id=0, **settings)
        assert hasattr(model, "_compiled_call"), "generate has not compiled the model"


def test_moving_a_module_calls_the_apply_of_each_part():
    """`HQQLinear` overrides `nn.Module._apply` to keep packed bits from being cast."""
    calls = []

    class Recording(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
            calls.append(fn(torch.zeros(1)).dtype)
            return super()._apply(fn, recurse)

    part = Recording(2, 2)
    assert nn.Sequential(part).to(torch.bfloat16).half()[0] is part
    assert calls == [torch.bfloat16, torch.float16], (
        "nn.Module.to no longer calls _apply of its parts: HQQLinear must protect packed bits in "
        "another way; look at torch.__future__ and nn.Module.to"
    )


def test_deepspeed(one_rank: HashStore, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    deepspeed = zero3._deepspeed(CPU)
    with advised("disable_deepspeed_shared_memory"):
        assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    module = nn.Linear(5, 3)
    weight = module.weight.detach().clone()
    zero3.partition_parameters(module, CPU)
    with advised("zero3_shard"):
        assert compat.zero3_shard(weight) is None
        shard = compat.zero3_shard(module.weight)
        assert shard is not None
        assert torch.equal(shard.flatten(), weight.flatten())
    with advised("zero3_shape"):
        assert module.weight.shape != weight.shape
        assert compat.zero3_shape(module.weight) == weight.shape
    optimizer = torch.optim.AdamW(module.parameters())
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=zero3._config())[0]
    with advised("zero3_inner_optimizer"):
        assert compat.zero3_inner_optimizer(engine) is optimizer
    with advised("zero3_flat_parameters"):
        (flat,) = compat.zero3_flat_parameters(engine)
        assert (flat.dtype, flat.numel()) == (torch.float32, 5 * 3 + 3)
        engine.backward(engine(torch.ones(2, 5)).sum())
        engine.step()
        assert list(optimizer.state) == [flat]
        assert optimizer.state[flat].keys() >= {"step", *zero3.MOMENTS}
