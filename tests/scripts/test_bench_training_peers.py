"""The peers of scripts/bench_training_peers.py need a GPU; what does not is tested here."""

import bench_training_peers
import pytest


def test_weights_are_saved_once(tmp_path):
    (tmp_path / "model.safetensors").touch()
    bench_training_peers.save_weights(tmp_path)  # it would need a GPU otherwise
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("peer", bench_training_peers.PEERS)
def test_every_peer_says_what_it_is(peer):
    assert bench_training_peers.PEERS[peer].__doc__
