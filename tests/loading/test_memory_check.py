"""A run that cannot fit is refused, one that may not fit is warned about, with keys that help."""

from dataclasses import replace

import pytest
import torch
from memory_estimates import GIB, PLENTY, estimate, meta_model, two_bit_config

from hqqtrain.common.errors import UserError
from hqqtrain.distributed.comm import SINGLE_PROCESS
from hqqtrain.distributed.strategies.fsdp2 import FSDP2
from hqqtrain.distributed.strategies.unsharded import SingleProcess
from hqqtrain.loading import memory_check
from hqqtrain.loading.memory_check import AvailableMemory, available_memory, check_fits, oom_advice
from hqqtrain.loading.memory_estimate import estimate_memory
from hqqtrain.tasks.resources import workload_of


def test_a_run_that_cannot_fit_is_refused_with_keys():
    config = two_bit_config()
    needs = estimate(
        config, meta_model("meta-llama/Meta-Llama-3-70B", config), dtype=torch.bfloat16
    )
    assert check_fits(needs, PLENTY, workload_of(config)) == []
    with pytest.raises(
        UserError, match=r"weights and optimizer need .* GiB.*eval\.reference=streamed or off"
    ):
        check_fits(
            needs, AvailableMemory(host=1 << 50, disk=1 << 50, device=80 * GIB), workload_of(config)
        )


def test_a_model_in_full_precision_is_its_own_reference():
    """Its base linears take the memory of the source, and the advice is to quantize them."""
    config = two_bit_config()
    config.quant.nbits = None
    model = meta_model("meta-llama/Meta-Llama-3-70B", config)
    needs = estimate(config, model, dtype=torch.bfloat16)
    dense = sum(p.numel() for n, p in model.named_parameters() if ".lora_" not in n)
    assert needs.device["dense weights"] == 2 * dense
    assert needs.device["packed weights"] == needs.device["reference model"] == 0
    assert needs.disk["quantized/"] == 0
    small = AvailableMemory(host=1 << 50, disk=1 << 50, device=80 * GIB)
    advice = r"fsdp2, or quant\.nbits=8 or less \(now null: nothing is quantized\)"
    with pytest.raises(UserError, match=advice):
        check_fits(needs, small, workload_of(config))
    advice = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "quant.nbits=8 or less" in advice
    assert "eval.reference" not in advice


def test_offloaded_parameters_count_as_host_memory():
    config = two_bit_config()
    model = meta_model("tiny", config)
    config.parallel.offload = "parameters"
    before, after = (
        estimate_memory(
            workload_of(config),
            model,
            FSDP2(SINGLE_PROCESS, offloads_parameters=offloads),
            dtype=torch.float32,
        )
        for offloads in (False, True)
    )
    moved = ("packed weights", "dense weights", "adapter and optimizer", "reference model")
    assert before.host == 0
    assert after.host == sum(before.device[part] for part in moved)
    assert [after.device[part] for part in moved] == [0, 0, 0, 0]
    free = AvailableMemory(host=after.host * 7, disk=1 << 50, device=1 << 50)
    with pytest.raises(UserError, match=r"parallel\.offload=parameters: 8 ranks would keep"):
        check_fits(after, free, workload_of(config), local_ranks=8)


@pytest.mark.parametrize("key", ["quant.offload_meta=true", "parallel.offload=parameters"])
def test_what_a_single_process_offloads_counts_as_host_memory(key: str):
    config = two_bit_config()
    model = meta_model("tiny", config)
    is_meta = key.startswith("quant")
    config.quant.offload_meta = is_meta
    config.parallel.offload = "none" if is_meta else "parameters"
    before, after = (
        estimate_memory(workload_of(config), model, strategy, dtype=torch.bfloat16)
        for strategy in (
            SingleProcess(SINGLE_PROCESS),
            SingleProcess(SINGLE_PROCESS, offloads_meta=is_meta, offloads_parameters=not is_meta),
        )
    )
    meta = 2 * sum(p.numel() * 2 for n, p in model.named_parameters() if n.endswith(".scale"))
    packed, dense, reference = "packed weights", "dense weights", "reference model"
    assert before.device["adapter and optimizer"] == after.device["adapter and optimizer"] > 0
    if is_meta:
        assert after.host == before.device[packed] - after.device[packed] == meta
        assert after.device[dense] == before.device[dense]
        more = after.device["working memory"] - before.device["working memory"]
        assert more == 2 * meta // 6, "two decoder layers of six"
    else:
        assert after.device[packed] == 0
        outside = (2 * 4096 + 1) * 256 * 2 - 4096 * 256 * 2  # embeddings that are the head, a norm
        assert after.device[dense] == after.device[reference] == outside
        moved = (packed, dense, reference)
        assert after.host == sum(before.device[part] - after.device[part] for part in moved)
    assert f"host memory {after.host / GIB:.2g} GiB" in str(after)
    free = AvailableMemory(host=after.host - 1, disk=1 << 50, device=1 << 50)
    with pytest.raises(UserError, match=f"{key}: 1 ranks would keep"):
        check_fits(after, free, workload_of(config))


def test_advice_names_what_can_be_offloaded():
    config = two_bit_config()
    config.task = "eval"
    advice = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "quant.offload_meta=true; parallel.offload=parameters, in one process" in advice
    config.task, config.quant.offload_meta = "finetune", True
    advice = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "offload_meta" not in advice
    assert "parallel.strategy=fsdp2 with parallel.offload=parameters" in advice


def test_a_run_that_may_not_fit_gives_a_warning():
    config = two_bit_config()
    needs = estimate(config, meta_model("tiny", config), dtype=torch.float32)
    room = sum(needs.device.values())
    [warning] = check_fits(needs, AvailableMemory(host=room, disk=1 << 50), workload_of(config))
    assert "may not be enough" in warning
    assert "train." in warning


def test_calibration_that_does_not_fit_is_refused():
    config = two_bit_config()
    config.quant.calibration, config.eval.reference = "auto", "off"
    model = meta_model("meta-llama/Meta-Llama-3-70B", config)
    needs = estimate(config, model, dtype=torch.bfloat16)
    # 28,672 inputs take 24.5 GiB beside the packed weights.
    assert 45 * GIB < needs.calibration < 80 * GIB
    assert "to calibrate" in str(needs)
    free = AvailableMemory(host=1 << 50, disk=1 << 50, device=needs.calibration - 1)
    with pytest.raises(UserError, match=r"quant\.calibration: needs about .* GiB.*free\. Set"):
        check_fits(needs, free, workload_of(config))
    config.quant.calibration = None
    assert estimate(config, model, dtype=torch.bfloat16).calibration == 0


def test_ranks_share_the_memory_of_a_machine():
    config = two_bit_config()
    needs = estimate(config, meta_model("tiny", config), dtype=torch.float32)
    free = AvailableMemory(host=4 * sum(needs.device.values()), disk=1 << 50)
    assert check_fits(needs, free, workload_of(config)) == []
    assert check_fits(needs, free, workload_of(config), local_ranks=4) != []


def test_a_full_disk():
    config = two_bit_config()
    needs = estimate(config, meta_model("tiny", config), dtype=torch.float32)
    with pytest.raises(UserError, match=r"run\.root=runs: .*GiB of disk.*quant\.save=false"):
        check_fits(needs, AvailableMemory(host=1 << 50, disk=1000), workload_of(config))
    [warning] = check_fits(
        needs, AvailableMemory(1 << 50, sum(needs.disk.values())), workload_of(config)
    )
    assert "disk" in warning
    exported = replace(workload_of(config), saves_quantized=False)
    with pytest.raises(UserError, match=r"are free\. Choose another run\.root\.$"):
        check_fits(needs, AvailableMemory(host=1 << 50, disk=1000), exported)


def test_out_of_memory_advice_names_what_can_still_be_lowered():
    config = two_bit_config()
    config.train.micro_batch_size = 4
    config.quant.solver, config.quant.calibration = "gptq", "auto"
    text = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "train.micro_batch_size (now 4)" in text
    assert f"quant.calibration_tokens (now {config.quant.calibration_tokens})" in text
    assert "eval.reference=streamed or off (now resident, which keeps the full-prec" in text
    config.eval.reference = "cached"
    streamed = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "eval.reference=off (now cached, which keeps its embeddings and head" in streamed
    assert "train.activation_checkpointing=full or offload (now auto)" in text
    for mode, advice in ((3, "full or offload (now 3)"), ("full", "offload (now full)")):
        config.train.activation_checkpointing = mode
        text = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
        assert f"train.activation_checkpointing={advice}" in text
    config.train.activation_checkpointing = "offload"
    text = oom_advice(workload_of(config), SingleProcess(SINGLE_PROCESS))
    assert "train.activation_checkpointing" not in text


def test_this_machine_has_memory_and_disk(tmp_path):
    found = available_memory("cpu", tmp_path / "not" / "there" / "yet")
    assert found.device is None
    assert found.host > 0
    assert found.disk > 0


def test_the_limit_of_a_cgroup_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory_check, "_CGROUP_ROOT", tmp_path)
    (tmp_path / "memory.max").write_text("12345\n")
    assert memory_check.free_host_memory() == 12345
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_check.free_host_memory() > 12345
