"""Fingerprints do not depend on the sharding, and change with every bit and setting."""

from hashlib import sha256

import pytest
import torch

from hqqtrain.formats import fingerprint
from hqqtrain.formats.fingerprint import Fingerprint

SETTINGS = {"a": {"nbits": 2, "group_size": None}, "b": {"nbits": 4, "group_size": 64}}


def _tensors() -> dict[tuple[str, str], torch.Tensor]:
    torch.manual_seed(0)
    return {
        ("a", "W_q"): torch.randint(0, 256, (7, 32), dtype=torch.uint8),
        ("a", "scale"): torch.randn(7, 3).bfloat16(),
        ("b", "scale"): torch.randn(5, 3),
    }


def _whole(tensors, settings=SETTINGS) -> str:
    found = Fingerprint()
    for (module, name), tensor in tensors.items():
        found.update(module, name, 0, tensor)
    return found.hexdigest(settings)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_the_number_and_order_of_ranks_do_not_matter(world):
    tensors = _tensors()
    total = Fingerprint()
    for rank in reversed(range(world)):
        part = Fingerprint()
        for (module, name), tensor in reversed(tensors.items()):
            share = -(-len(tensor) // world)
            first = min(rank * share, len(tensor))
            part.update(module, name, first, tensor[first : first + share])
        total.merge(part.total)
    assert total.hexdigest(SETTINGS) == _whole(tensors)


def test_the_storage_dtype_does_not_matter():
    tensors = _tensors()
    viewed = {k: v.view(torch.float16) if k[1] == "W_q" else v for k, v in tensors.items()}
    assert _whole(viewed) == _whole(tensors)


def test_strides_do_not_matter():
    tensors = _tensors()
    strided = {k: v.t().contiguous().t() for k, v in tensors.items()}
    assert _whole(strided) == _whole(tensors)


def test_every_change_gives_another_fingerprint():
    tensors, seen = _tensors(), set()
    seen.add(_whole(tensors))
    for key, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(torch.uint8)[-1, -1] ^= 1
        seen.add(_whole(tensors | {key: changed}))
        seen.add(_whole(tensors | {key: tensor.flip(0)}))
        seen.add(_whole(tensors | {key: tensor.flip(1)}))
        seen.add(_whole({(k[0] + "x" * (k == key), k[1]): v for k, v in tensors.items()}))
        seen.add(_whole({(k[0], k[1] + "x" * (k == key)): v for k, v in tensors.items()}))
    seen.add(_whole(tensors, SETTINGS | {"a": {"nbits": 3, "group_size": None}}))
    assert len(seen) == 1 + 5 * len(tensors) + 1


def test_the_order_of_settings_does_not_matter():
    tensors = _tensors()
    assert _whole(tensors, dict(reversed(SETTINGS.items()))) == _whole(tensors)


MASK = 2**64 - 1


def _mixed(x: int) -> int:
    """The finalizer of splitmix64 as published."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def _hashed(name: str, first: int, rows: list[list[int]]) -> list[int]:
    key, width = int.from_bytes(sha256(name.encode()).digest()[:8], "little") >> 1, len(rows[0])
    sums = [0, 0]
    for number, row in enumerate(rows, first):
        for lane in range(2):
            odd = [_mixed(_mixed(lane * width + j + 1)) | 1 for j in range(width)]
            product = sum(word * m for word, m in zip(row, odd, strict=True)) & MASK
            sums[lane] += _mixed(product ^ _mixed(key + number & MASK))
    return [total & MASK for total in sums]


@pytest.mark.parametrize(("name", "dtype"), [("W_q", torch.int32), ("scale", torch.int16)])
def test_the_algorithm_never_changes(name, dtype):
    """Compare with an independent implementation: a change would orphan all saved adapters."""
    limits = torch.iinfo(dtype)
    words = torch.randint(limits.min, limits.max, (300, 12), dtype=dtype)
    found = Fingerprint()
    tensor = words.view(torch.uint8 if name == "W_q" else torch.bfloat16)
    found.update("m", name, 3, tensor)
    sums = _hashed(f"m.{name}", 3, words.tolist())
    final = sha256(b"".join(s.to_bytes(8, "little") for s in sums) + b"[1, {}]")
    assert found.hexdigest({}) == f"sha256:{final.hexdigest()}"


def test_the_chunk_size_does_not_matter(monkeypatch):
    whole = _whole(_tensors())
    monkeypatch.setattr(fingerprint, "_CPU_CHUNK_WORDS", 20)
    assert _whole(_tensors()) == whole


@pytest.mark.gpu
def test_a_gpu_computes_the_same_fingerprint():
    assert _whole({k: v.cuda() for k, v in _tensors().items()}) == _whole(_tensors())
