"""Small GGUF files with random blocks, written with the package `gguf`."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from hqqtrain.models.foreign.gguf_types import BLOCK_TYPES
from hqqtrain.models.source import TINY_FOLDER

HIDDEN, HEADS, KV_HEADS, VOCAB = 256, 2, 1, 64
LAYER = {
    "attn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN), "attn_k": (HIDDEN // 2, HIDDEN),
    "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN), "ffn_norm": (HIDDEN,),
    "ffn_gate": (256, HIDDEN), "ffn_up": (256, HIDDEN), "ffn_down": (HIDDEN, 256),
}  # fmt: skip
EXTRA = {
    "llama": {},
    "qwen2": {"attn_q.bias": (HIDDEN,), "attn_k.bias": (128,), "attn_v.bias": (128,)},
    "qwen3": {"attn_q_norm": (128,), "attn_k_norm": (128,)},
}


def random_blocks(name: str, rows: int, blocks: int) -> np.ndarray:
    """Return random blocks [rows, blocks, bytes], whose fp16 numbers are small ones."""
    kind = BLOCK_TYPES[name]
    generator = np.random.default_rng(len(name) + rows)
    data = generator.integers(0, 256, (rows, blocks, kind.block_bytes), dtype=np.uint8)
    starts = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(name, (0, 2))
    for start in starts if kind.offset else starts[:1]:
        values = generator.uniform(0.0001, 0.001, (rows, blocks, 1)).astype(np.float16)
        data[..., start : start + 2] = values.view(np.uint8)
    return data


def write_gguf(
    file: Path, types: Mapping[str, str], *, architecture: str = "llama",
    fields: Mapping[str, int] | None = None, texts: Mapping[str, str] | None = None,
    more: Mapping[str, np.ndarray] | None = None,
) -> Path:  # fmt: skip
    """Write a model of one layer.

    Args:
        file: The file; the bundled tokenizer is put next to it.
        types: Name of a matrix, such as `attn_q` -> type of its blocks; `F16` if it is not there.
        architecture: Name of the architecture in GGUF.
        fields: Further metadata that are numbers.
        texts: Further metadata that are texts.
        more: Further tensors.
    """
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed here")
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(256)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    for name, value in (fields or {}).items():
        writer.add_uint32(name, value)
    for name, text in (texts or {}).items():
        writer.add_string(name, text)
    layer = {name if "." in name else f"{name}.weight": shape
             for name, shape in (LAYER | EXTRA.get(architecture, {})).items()}  # fmt: skip
    shapes = {f"blk.0.{name}": shape for name, shape in layer.items()}
    shapes |= {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,),
               "output.weight": (VOCAB, HIDDEN)}  # fmt: skip
    for name, shape in shapes.items():
        kind = types.get(name.removesuffix(".weight").removeprefix("blk.0."))
        if kind and len(shape) == 2:
            blocks = random_blocks(kind, shape[0], shape[1] // BLOCK_TYPES[kind].block_size)
            data = blocks.reshape(shape[0], -1)
            writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
        else:
            values = np.random.default_rng(shape[0]).normal(0, 0.05, shape)
            dtype = np.float16 if len(shape) == 2 else np.float32
            writer.add_tensor(name, values.astype(dtype))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (file.parent / name).write_bytes((TINY_FOLDER / name).read_bytes())
    return file
