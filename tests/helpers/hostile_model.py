"""Hostile and broken folders of models."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile import Case, Inputs, edit_json, edit_tensors, nested, replace_by_fifo


def _model(break_it: Callable[[Path], object]) -> Callable[[Inputs], list[str]]:
    def make(inputs: Inputs) -> list[str]:
        folder = inputs.model()
        break_it(folder)
        return [f"model.name_or_path={folder}"]

    return make


def _config(**values: Any) -> Callable[[Inputs], list[str]]:
    return _model(lambda folder: edit_json(folder / "config.json", **values))


def _write(name: str, content: str | bytes) -> Callable[[Inputs], list[str]]:
    data = content.encode() if isinstance(content, str) else content
    return _model(lambda folder: (folder / name).write_bytes(data))


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Inputs], list[str]]:
    return _model(lambda folder: edit_tensors(folder / "model.safetensors", change))


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Inputs], list[str]]:
    """Return what changes the header of the safetensors file."""

    def break_it(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (size,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])

    return _model(break_it)


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _index(weight_map: Any) -> Callable[[Inputs], list[str]]:
    """Return what adds an index that distributes the tensors over files."""

    def break_it(folder: Path) -> None:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")

    return _model(break_it)


def _only(name: str) -> Callable[[Inputs], list[str]]:
    """Return what leaves weights in another format only."""
    return _model(lambda folder: (folder / "model.safetensors").rename(folder / name))


def _model_is_a_file(inputs: Inputs) -> list[str]:
    return [f"model.name_or_path={inputs.model() / 'config.json'}"]


def _slow_pattern(folder: Path) -> None:
    """Write a tokenizer whose pattern takes exponential time on a long word."""
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    tokenizer["pre_tokenizer"] = {
        "type": "Split", "pattern": {"Regex": r"(a+)+$"}, "behavior": "Isolated", "invert": False
    }  # fmt: skip
    file.write_text(json.dumps(tokenizer))


def _poison(name: str, value: float) -> Callable[[Inputs], list[str]]:
    return _tensors(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


Q = "model.layers.1.self_attn.q_proj.weight"

CASES = {
    "no such folder": Case(["model.name_or_path=./no/such/folder"], ("./no/such/folder",)),
    "no name": Case(["model.name_or_path=''"], ("model.name_or_path",)),
    "name with a line break": Case(["model.name_or_path='a\nb'"], ("model.name_or_path",)),
    "a file for a folder": Case(_model_is_a_file, ("model.name_or_path", "config.json")),
    "no config.json": Case(_model(lambda f: (f / "config.json").unlink()), ("config.json",)),
    "config.json empty": Case(_write("config.json", ""), ("config.json",)),
    "config.json no JSON": Case(_write("config.json", "{'a': 1}"), ("config.json",)),
    "config.json a list": Case(_write("config.json", "[1, 2]"), ("config.json",)),
    "config.json nested": Case(_write("config.json", nested()), ("config.json",)),
    "config.json of 100 MB": Case(
        _write("config.json", '{"a": "' + "x" * 100_000_000 + '"}'), ("config.json",)
    ),
    "config.json a pipe": Case(
        _model(lambda f: replace_by_fifo(f / "config.json")), ("config.json",)
    ),
    "config.json with NaN": Case(_config(rms_norm_eps=float("nan")), ("rms_norm_eps",)),
    "hidden_size 1e12": Case(_config(hidden_size=10**12), ("hidden_size",)),
    "hidden_size negative": Case(_config(hidden_size=-32), ("hidden_size",)),
    "hidden_size a string": Case(_config(hidden_size="32"), ("hidden_size",)),
    "1e8 layers": Case(_config(num_hidden_layers=10**8), ("num_hidden_layers",)),
    "no heads": Case(_config(num_attention_heads=0), ("config.json",)),
    "heads that do not divide": Case(_config(head_dim=None, num_attention_heads=5), ("attention",)),
    "no vocabulary": Case(_config(vocab_size=0), ("config.json",)),
    "vocabulary of 1e12": Case(_config(vocab_size=10**12), ("vocab_size",)),
    "unknown activation": Case(_config(hidden_act="swish9"), ("config.json", "swish9")),
    "unknown model_type": Case(_config(model_type="llama99"), ("llama99",)),
    "no model_type": Case(_config(model_type=...), ("model_type",)),
    "code of its own": Case(
        _config(auto_map={"AutoModelForCausalLM": "x--y.Z"}, model_type="mine"), ("mine",)
    ),
    "attention from the hub": Case(
        _config(attn_implementation="kernels-community/flash-attn"), ("attn_implementation",)
    ),
    "quantization_config a string": Case(
        _config(quantization_config="gptq"), ("quantization_config",)
    ),
    "quantization_config unknown": Case(
        _config(quantization_config={"quant_method": "magic"}), ("magic",)
    ),
    "an encoder": Case(_config(model_type="vit"), ("vit",)),
    "safetensors truncated": Case(_model(_truncate), ("model.safetensors",)),
    "safetensors empty": Case(_write("model.safetensors", b""), ("model.safetensors",)),
    "safetensors with a huge header": Case(
        _write("model.safetensors", struct.pack("<Q", 1 << 62) + b"{}"), ("model.safetensors",)
    ),
    "safetensors with a broken header": Case(
        _write("model.safetensors", struct.pack("<Q", 8) + b"{{{{{{{{"), ("model.safetensors",)
    ),
    "safetensors beyond its end": Case(
        _header(lambda h: h[Q].update(data_offsets=[0, 1 << 50])), ("model.safetensors",)
    ),
    "safetensors with an unknown dtype": Case(
        _header(lambda h: h[Q].update(dtype="F4")), ("model.safetensors",)
    ),
    "safetensors a pipe": Case(
        _model(lambda f: replace_by_fifo(f / "model.safetensors")), ("model.safetensors",)
    ),
    "a tensor is missing": Case(_tensors(lambda t: t.pop(Q)), (Q,)),
    "a tensor has another shape": Case(
        _tensors(lambda t: t.update({Q: torch.ones(3, 3)})), (Q, "[3, 3]", "[32, 32]")
    ),
    "a tensor of integers": Case(
        _tensors(lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int64)})), (Q, "int64")
    ),
    "a weight is NaN": Case(_poison(Q, float("nan")), (Q, "31")),
    "a weight is infinite": Case(_poison(Q, float("-inf")), (Q, "31")),
    "a norm is NaN": Case(_poison("model.norm.weight", float("nan")), ("model.norm.weight",)),
    "all weights are 0": Case(_tensors(lambda t: [x.zero_() for x in t.values()])),
    "weights of 1e38": Case(_tensors(lambda t: t[Q].fill_(1e38)), ("train.on_nonfinite",)),
    "an index of other folders": Case(_index({Q: "../../secret.safetensors"}), ("index.json",)),
    "an index of missing files": Case(_index({Q: "gone.safetensors"}), ("gone.safetensors",)),
    "an index that is a list": Case(_index(["a"]), ("index.json",)),
    "only a pickle": Case(_only("pytorch_model.bin"), ("safetensors",)),
    "only damaged GGUF": Case(_only("model.gguf"), ("not a complete GGUF file",)),
    "no tokenizer": Case(
        _model(lambda f: [t.unlink() for t in f.glob("tokenizer*")]), ("tokenizer",)
    ),
    "tokenizer no JSON": Case(_write("tokenizer.json", "garbage"), ("tokenizer",)),
    "tokenizer nested": Case(_write("tokenizer.json", nested()), ("tokenizer",)),
    "tokenizer beyond the vocabulary": Case(
        _model(
            lambda f: (
                edit_json(f / "config.json", vocab_size=100),
                edit_tensors(
                    f / "model.safetensors",
                    lambda t: t.update(
                        {"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].clone()}
                    ),
                ),
            )
        ),
        ("vocab",),
    ),
    "tokenizer with a slow pattern": Case(_model(_slow_pattern)),
    "tokenizer linked outside": Case(
        _model(lambda f: (f / "vocab.txt").symlink_to("/etc/passwd")), ("vocab.txt", "/etc/passwd")
    ),
    "generation_config no JSON": Case(_write("generation_config.json", "garbage")),
    "a folder without weights": Case(
        _model(lambda f: (f / "model.safetensors").unlink()), ("safetensors",)
    ),
    "an empty folder": Case(_model(lambda f: (shutil.rmtree(f), f.mkdir())), ("config.json",)),
}
