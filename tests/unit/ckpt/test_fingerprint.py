"""The same at any sharding; another for any change that matters."""

from hashlib import sha256

import pytest
import torch

from hqqtrain.ckpt import Fingerprint

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
def test_any_number_of_ranks_in_any_order(world):
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


def test_the_storage_dtype_is_no_part_of_it():
    tensors = _tensors()
    viewed = {k: v.view(torch.float16) if k[1] == "W_q" else v for k, v in tensors.items()}
    assert _whole(viewed) == _whole(tensors)


def test_strided_tensors_count_by_value():
    tensors = _tensors()
    strided = {k: v.t().contiguous().t() for k, v in tensors.items()}
    assert _whole(strided) == _whole(tensors)


def test_every_change_shows():
    tensors, seen = _tensors(), set()
    seen.add(_whole(tensors))
    for key, tensor in tensors.items():
        changed = tensor.clone()
        changed.view(torch.uint8)[-1, -1] ^= 1
        seen.add(_whole(tensors | {key: changed}))
        seen.add(_whole(tensors | {key: tensor.flip(0)}))
        seen.add(_whole({(k[0] + "x" * (k == key), k[1]): v for k, v in tensors.items()}))
        seen.add(_whole({(k[0], k[1] + "x" * (k == key)): v for k, v in tensors.items()}))
    seen.add(_whole(tensors, SETTINGS | {"a": {"nbits": 3, "group_size": None}}))
    assert len(seen) == 1 + 4 * len(tensors) + 1


def test_settings_have_no_order():
    tensors = _tensors()
    assert _whole(tensors, dict(reversed(SETTINGS.items()))) == _whole(tensors)


def test_it_is_the_same_for_ever():
    """Adapters carry it: a change of the algorithm would orphan them all. Here it is, spelt out."""
    found = Fingerprint()
    found.update("m", "W_q", 3, torch.arange(8, dtype=torch.uint8).view(2, 4))
    rows = [(3, bytes([0, 1, 2, 3])), (4, bytes([4, 5, 6, 7]))]
    hashes = [sha256(b"m.W_q\0" + i.to_bytes(8, "little") + row) for i, row in rows]
    total = sum(int.from_bytes(h.digest(), "little") for h in hashes) % 2**256
    final = sha256(total.to_bytes(32, "little") + b"[1, {}]")
    assert found.hexdigest({}) == f"sha256:{final.hexdigest()}"
