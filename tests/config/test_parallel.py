"""The group parallel: whether parameters are offloaded."""

from hqqtrain.config.parallel import ParallelConfig


def test_what_is_offloaded():
    assert ParallelConfig(offload="parameters").offloads_parameters
    assert not ParallelConfig(offload="none").offloads_parameters
