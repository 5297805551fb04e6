"""The commands that compare_trees.py runs, and the inputs it gives them.

Every path is relative to the folder a case runs in, so that no recorded digest depends on it.
Keys are spelled as in the oldest tree; `translate` spells them as the tree under test does.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

RENAMED = {
    "train.checkpointing": "train.activation_checkpointing",
    "quant.storage": "quant.storage_dtype",
    "parallel.hybrid": "parallel.hsdp",
    "parallel.check_every": "parallel.consistency_check_every",
    "launch.jobs": "launch.max_parallel_jobs",
    "train.objective=sft": "train.objective=next_token",
}
"""Old key, or key=value, to the new one. The new name is used if `--help` of the tree shows it."""

BASE = (
    "model.name_or_path=model", "data.source=train.txt", "eval.source=held_out.txt",
    "eval.tokens=256", "quant.nbits=4", "train.max_steps=3", "train.global_batch_size=4",
    "train.micro_batch_size=2", "train.max_seq_len=64", "train.checkpointing=false", "adapter.r=4",
    "optim.lr=0.01", "ckpt.every=2", "track.backends=[]", "run.root=runs", "run.name=run",
)  # fmt: skip
QUANTIZE = (*BASE, "task=quantize")
BUNDLED = (*BASE, "recipe=tiny_2bit", "model.name_or_path=tiny")
TWICE = (*BASE, "train.max_steps=4", "optim.schedule=constant")
"""An extended run is the longer run only if the learning rate does not depend on the length."""


@dataclass(frozen=True)
class Command:
    """The arguments of one `python -m hqqtrain`, started by torchrun if `ranks` exceeds one."""

    words: tuple[str, ...]
    ranks: int = 1


@dataclass(frozen=True)
class Case:
    """Commands that run one after another in the same folder."""

    name: str
    commands: tuple[Command, ...]


def all_cases() -> list[Case]:
    """Return every case; a later word of a command overrides an earlier one."""
    return [*_quantize(), *_finetune(), *_sequences(), *_ranks(), *_refusals()]


def _quantize() -> Iterator[Case]:
    changes = {
        "nbits8": "quant.nbits=8", "nbits3": "quant.nbits=3", "nbits2": "quant.nbits=2",
        "nbits1": "quant.nbits=1", "axis0": "quant.axis=0",
        "group32": "quant.group_size=32", "group128": "quant.group_size=128",
        "group_none": "quant.group_size=null", "solver_hqq": "quant.solver=hqq",
        "solver_rtn": "quant.solver=rtn",
        "overrides": "quant.overrides={*.down_proj:{nbits:8,group_size:32},*.q_proj:null}",
        "nothing_skipped": "quant.skip=[]",
        "meta_fp32": "quant.meta_dtype=fp32", "meta_fp16": "quant.meta_dtype=fp16",
        "storage_uint8": "quant.storage=uint8", "storage_bf16": "quant.storage=bf16",
        "storage_fp32": "quant.storage=fp32", "compute_bf16": "quant.compute_dtype=bf16",
        "synthetic": "model.source=synthetic", "backend_torch": "quant.backend=torch",
        "unsaved": "quant.save=false",
    }  # fmt: skip
    yield _case("quantize", QUANTIZE)
    for name, word in changes.items():
        yield _case(f"quantize_{name}", (*QUANTIZE, word))
    for solver in ("hqq", "rtn"):
        yield _case(
            f"quantize_axis0_{solver}", (*QUANTIZE, "quant.axis=0", f"quant.solver={solver}")
        )
    cached = (*QUANTIZE, "quant.cache_dir=cache")
    yield _case("quantize_cached", cached, (*cached, "run.name=other"))


def _finetune() -> Iterator[Case]:
    changes: dict[str, tuple[str, ...]] = {
        "activation_checkpointing": ("train.checkpointing=true",),
        "unpacked": ("train.packing=false",),
        "accumulation": ("train.micro_batch_size=1",),
        "dropout": ("adapter.dropout=0.1",),
        "rslora_gaussian": ("adapter.kind=rslora", "adapter.init=gaussian"),
        "adapter_bf16": ("adapter.dtype=bf16",),
        "target_modules": ("adapter.target_modules=[*.q_proj,*.up_proj]",),
        "precision_bf16": ("train.precision=bf16",),
        "storage_bf16": ("quant.storage=bf16",),
        "adamw_8bit": ("optim.name=adamw_8bit",),
        "weight_decay": ("optim.weight_decay=0.1", "train.max_grad_norm=null"),
        "linear_warmup": ("optim.schedule=linear", "optim.warmup_steps=2"),
        "constant": ("optim.schedule=constant",),
        "epochs": ("train.max_steps=null", "train.epochs=0.15"),
        "eval_every": ("eval.every=1", "ckpt.keep_best=1"),
        "no_reference": ("eval.reference=off",),
        "keep_last": ("ckpt.every=1", "ckpt.keep_last=1"),
        "seed": ("train.seed=7",),
        "unsaved": ("quant.save=false",),
        "objective": ("train.objective=sft",),
        "nbits2_axis0": ("quant.nbits=2", "quant.axis=0"),
        "nonfinite_stop": ("optim.lr=1e30", "optim.schedule=constant"),
        "nonfinite_skip": ("optim.lr=1e30", "optim.schedule=constant", "train.on_nonfinite=skip"),
        "nonfinite_rollback": (
            "optim.lr=1e30", "optim.schedule=constant", "train.on_nonfinite=rollback",
        ),
    }  # fmt: skip
    yield _case("finetune", BASE)
    yield _case("finetune_bundled", BUNDLED)
    stdlib = ("data.source=python_stdlib", "eval.source=python_stdlib", "train.max_steps=1")
    yield _case("finetune_stdlib", (*BASE, *stdlib))
    for name, words in changes.items():
        yield _case(f"finetune_{name}", (*BASE, *words))


def _sequences() -> Iterator[Case]:
    longer = (*TWICE, "train.max_steps=6")
    yield _case("resume_extended", TWICE, (*longer, "run.resume=must"))
    yield _case("resume_finished", BASE, BASE)
    yield _case("resume_never", TWICE, (*TWICE, "run.resume=never"))
    of_run = ("model.name_or_path=runs/run", "run.name=second")
    for task in ("eval", "export"):
        yield _case(f"{task}_of_run", BASE, (*BASE, f"task={task}", *of_run))
    base = (*BASE, "task=export", "model.name_or_path=runs/run/quantized", "run.name=second")
    yield _case("export_of_base", QUANTIZE, base)
    start = (*BASE, "adapter.init_from=runs/run/adapter", "run.name=second")
    yield _case("adapter_init_from", BASE, start)
    sweep = ("-m", *BASE[:-1], "quant.nbits=4,2", "train.max_steps=1", "launch.jobs=1")
    yield _case("sweep", sweep)


def _ranks() -> Iterator[Case]:
    for strategy in ("ddp", "fsdp2", "fsdp1", "zero3"):
        words = (*BASE, f"parallel.strategy={strategy}", "parallel.check_every=1")
        yield Case(f"ranks2_{strategy}", (Command(words, ranks=2),))


def _refusals() -> Iterator[Case]:
    yield _case(
        "refusals",
        (*BASE, "quant.nbit=4"),
        (*BASE, "recipe=no_such_recipe"),
        (*BASE, "quant.nbits=5"),
        (*BASE, "quant.nbits=four"),
        (*BASE, "data.source=no_such_file.txt"),
        (*BASE, "run.resume=must"),
        (*BASE, "parallel.strategy=fsdp3"),
        ("--no-such-flag",),
        ("word",),
        ("--table", "quant.nbits=2"),
        ("--version",),
        (*BASE, "--check"),
    )
    nan = ("model.name_or_path=model_with_nan",)
    yield _case("nan_in_weight", (*QUANTIZE, *nan), (*BASE, *nan, "run.name=finetune"))
    yield _case("another_configuration", QUANTIZE, (*QUANTIZE, "quant.nbits=2"))


def _case(name: str, *commands: tuple[str, ...]) -> Case:
    return Case(name, tuple(Command(words) for words in commands))


def usage_of(tree: Path) -> str:
    """Return the `--help` text of the package of `tree`."""
    packages = os.pathsep.join([str(tree), str(tree / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "hqqtrain", "--help"],
        cwd=tree,  # Python looks in the working directory before PYTHONPATH
        env={**os.environ, "PYTHONPATH": packages},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def translate(words: tuple[str, ...], usage: str) -> list[str]:
    """Return the words with the keys that a tree's `--help` text, `usage`, knows."""
    translated = []
    for word in words:
        key, _, value = word.partition("=")
        if word in RENAMED and RENAMED[word].partition("=")[2] in usage:
            word = RENAMED[word]
        elif key in RENAMED and RENAMED[key] in usage:
            word = f"{RENAMED[key]}={value}"
        translated.append(word)
    return translated


def write_inputs(folder: Path, tree: Path) -> None:
    """Write two texts and two small Llama models with the tokenizer of `tree` into `folder`."""
    import torch

    for name, seed, lines in (("train", 1, 900), ("held_out", 2, 200)):
        (folder / f"{name}.txt").write_text(_text(random.Random(seed), lines))
    (tokenizer,) = {path.parent for path in tree.glob("hqqtrain/**/tokenizer.json")}
    weights = _weights()
    for name in ("model", "model_with_nan"):
        model = folder / name
        model.mkdir()
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tokenizer / file, model / file)
        (model / "config.json").write_text(json.dumps(_SHAPE, indent=2))
        if name == "model_with_nan":
            weights["model.layers.1.mlp.up_proj.weight"][5, 3] = torch.nan
        from safetensors.torch import save_file

        save_file(weights, model / "model.safetensors", {"format": "pt"})


def _text(chance: random.Random, lines: int) -> str:
    """Return lines that look like code: a text of random letters would leave nothing to learn."""
    names = ["value", "index", "result", "items", "count", "name", "total", "path"]
    forms = ["    {} = {}({})", "def {}_{}({}):", "    return {} + {} * {}", "for {} in {}({}):"]
    text = (chance.choice(forms).format(*chance.choices(names, k=3)) for _ in range(lines))
    return "\n".join(text) + "\n"


_HIDDEN, _INNER, _VOCABULARY, _LAYERS = 128, 256, 4096, 2
_SHAPE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN, "intermediate_size": _INNER, "num_hidden_layers": _LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "hidden_act": "silu",
    "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 0, "dtype": "bfloat16",
}  # fmt: skip


def _weights() -> dict:
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = {"self_attn.q_proj": (_HIDDEN, _HIDDEN), "self_attn.k_proj": (_HIDDEN // 2, _HIDDEN)}
    shapes |= {"self_attn.v_proj": (_HIDDEN // 2, _HIDDEN)}
    shapes |= {"self_attn.o_proj": (_HIDDEN, _HIDDEN), "mlp.gate_proj": (_INNER, _HIDDEN)}
    shapes |= {"mlp.up_proj": (_INNER, _HIDDEN), "mlp.down_proj": (_HIDDEN, _INNER)}
    weights = {"model.norm.weight": torch.ones(_HIDDEN)}
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = torch.randn(_VOCABULARY, _HIDDEN, generator=generator) * 0.1
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{prefix}.{norm}.weight"] = torch.ones(_HIDDEN)
        for name, shape in shapes.items():
            weights[f"{prefix}.{name}.weight"] = torch.randn(*shape, generator=generator) * 0.1
    return {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
