"""GPUs are found by the names that users and drivers give them."""

import pytest

from hqqtrain.common.gpus import GB, GIB, GPUS, find_gpu, gpu_of_device


@pytest.mark.parametrize("name", ["RTX4090", "rtx 4090", "RTX-4090"])
def test_a_name_may_be_written_in_several_ways(name: str):
    assert find_gpu(name) == GPUS["RTX 4090"]


def test_a_size_stands_for_a_gpu_of_unknown_speed():
    gpu = find_gpu("24GB")
    assert gpu is not None
    assert (gpu.memory, gpu.flops) == (24 * GB, None)
    assert find_gpu("1.5 gib") is not None
    assert find_gpu("1.5 gib").memory == 1.5 * GIB  # type: ignore[union-attr]
    assert find_gpu("24") is find_gpu("H2000") is None


def test_names_of_devices():
    assert gpu_of_device("NVIDIA GH200 480GB") == GPUS["GH200"]
    assert gpu_of_device("NVIDIA GeForce RTX 4090") == GPUS["RTX 4090"]
    assert gpu_of_device("NVIDIA RTX A1000") is gpu_of_device("cpu") is None
