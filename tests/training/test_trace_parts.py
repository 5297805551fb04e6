"""Events of a trace are added up by the part of the step that their names tell."""

import gzip
import json
from typing import Any

import pytest
import torch
from torch.profiler import profile, schedule

from hqqtrain.training.trace_parts import PARTS, part_of, step_parts

NAMES = {
    "products": (
        "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
        "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn>",
        "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>",
        "_wide_gemm_kernel",
        "_gemv_kernel",
        "aten::addmm",
        "aten::mm",
        "hqqtrain::linear",
    ),
    "attention": (
        "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1",
        "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<pytorch_flash::Flash>",
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "dequantization": ("_dequantize_rows_kernel", "dequantize_any_kernel", "hqqtrain::dequantize"),
    "communication": (
        "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "c10d::allreduce_",
        "Memcpy PtoP (Device -> Device)",
    ),
    "loss": (
        "liger_cross_entropy_kernel",
        "void at::native::(anonymous namespace)::cunn_SoftMaxForward<8, float, float, float>",
        "aten::_log_softmax",
        "aten::nll_loss_forward",
    ),
    "optimizer": (
        "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        "aten::_fused_adamw_",
        "kOptimizerStatic8bit2StateBlockwise",
    ),
    "data": ("Memcpy HtoD (Pinned -> Device)", "Memcpy DtoH (Device -> Pageable)"),
    "elementwise": (
        "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>",
        "triton_poi_fused_mul_silu_0",
        "_rms_norm_forward_kernel",
        "_triton_rope",
        "_gated_activation_backward_kernel",
        "void at::native::(anonymous namespace)::CatArrayBatchedCopy<c10::BFloat16, unsigned>",
        "Memcpy DtoD (Device -> Device)",
        "aten::mul",
    ),
}


@pytest.mark.parametrize(
    ("part", "name"), [(part, name) for part, names in NAMES.items() for name in names]
)
def test_names_of_kernels_and_operations(part: str, name: str) -> None:
    assert part_of(name) == part


def event(name: str, begin: float, duration: float, category: str, thread: int = 1) -> dict:
    return {"ph": "X", "name": name, "ts": begin, "dur": duration, "cat": category, "pid": 0,
            "tid": thread}  # fmt: skip


STEPS = [event("ProfilerStep#3", 0, 100, "user_annotation"),
         event("ProfilerStep#4", 100, 100, "user_annotation"),
         event("ProfilerStep#3", 5, 180, "gpu_user_annotation")]  # fmt: skip


def by_part(events: list[dict[str, Any]]) -> dict[str, tuple[float, float, float]]:
    found = step_parts([*STEPS, *events])
    assert tuple(each.part for each in found) == PARTS
    return {each.part: (each.milliseconds * 1e3, each.share, each.calls) for each in found}


def test_kernels_of_two_streams() -> None:
    """Operations of the host do not count on a GPU; idle is time without any kernel."""
    parts = by_part([
        event("nvjet_tst", 20, 60, "kernel"),
        event("ncclDevKernel_AllGather", 40, 80, "kernel", thread=2),
        event("triton_poi_fused_0", 150, 20, "kernel"),
        event("aten::mm", 0, 200, "cpu_op"),
        event("Memset (Device)", 170, 40, "gpu_memset"),
    ])  # fmt: skip
    assert parts["products"] == (30, 0.3, 0.5)
    assert parts["communication"] == (40, 0.4, 0.5)
    assert parts["elementwise"] == (30, pytest.approx(0.3), 1)
    assert parts["idle"] == (25, pytest.approx(50 / 210), 0)


def test_an_operation_of_a_cpu_counts_without_those_that_it_calls() -> None:
    parts = by_part([
        event("aten::linear", 0, 100, "cpu_op"),
        event("aten::addmm", 10, 60, "cpu_op"),
        event("aten::copy_", 20, 10, "cpu_op"),
        event("aten::mul", 100, 40, "cpu_op"),
        event("aten::mul", 50, 20, "cpu_op", thread=2),
    ])  # fmt: skip
    assert parts["products"] == (45, pytest.approx(90 / 160), 1)
    assert parts["elementwise"] == (35, pytest.approx(70 / 160), 1.5)
    assert parts["idle"] == (30, 0.3, 0)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no steps"):
        step_parts([event("aten::mm", 0, 1, "cpu_op")])


def test_a_trace_of_this_pytorch(tmp_path) -> None:
    """The names of the steps and the categories are those that PyTorch writes."""
    file = tmp_path / "trace.json.gz"
    a = torch.rand(256, 256)
    with profile(
        schedule=schedule(wait=0, warmup=1, active=2),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
    ) as profiler:
        for _ in range(3):
            torch.exp(a @ a)
            profiler.step()
    with gzip.open(file, "rt") as text:
        parts = {p.part: p for p in step_parts(json.load(text)["traceEvents"])}
    assert parts["products"].calls >= 1
    assert parts["products"].milliseconds > 0 < parts["elementwise"].milliseconds
    assert sum(p.share for p in parts.values() if p.part != "idle") == pytest.approx(1)
