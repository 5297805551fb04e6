"""PROVISIONAL (lead's integration stub; MATH replaces this file)."""

from dataclasses import dataclass, replace

import torch

from hqqtrain.config import UserError
from hqqtrain_kernels import reference
from hqqtrain_kernels.layout import Layout


@dataclass(frozen=True)
class QuantSpec:
    nbits: int
    group_size: int | None
    axis: int
    solver: str
    meta_dtype: torch.dtype

    @classmethod
    def from_config(cls, c):
        d = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        auto = torch.float32 if c.nbits == 8 else torch.bfloat16
        return cls(c.nbits, c.group_size, c.axis, c.solver, d.get(c.meta_dtype, auto))

    def with_settings(self, **own):
        return replace(self, **own)

    def layout(self, out_features, in_features, name=""):
        n = in_features if self.axis == 1 else out_features
        g = self.group_size or n
        if n % g:
            raise UserError(f"quant.group_size={g}: does not divide {n} of {name}")
        return Layout(out_features, in_features, self.nbits, g, self.axis)


@dataclass
class Quantized:
    W_q: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def quantize(W, spec, *, name="weight"):
    lay = spec.layout(*W.shape)
    if not torch.isfinite(W).all():
        raise UserError(f"{name}: NaN or Inf in row {(~torch.isfinite(W)).any(1).nonzero()[0].item()}")
    w = W.float().view(-1, lay.units, lay.in_features).permute(1, 2, 0) if spec.axis == 0 else W.float()
    w = w.reshape(-1, lay.group_size)
    mv = 2**spec.nbits - 1
    mn, mx = w.amin(1, True), w.amax(1, True)
    best = None
    for f in (1.0, 0.8, 0.6):
        c, h = (mn + mx) / 2, (mx - mn) / 2 * f
        s = (2 * h / mv).clamp_min(1e-9)
        z = -(c - h) / s
        for _ in range(6):
            q = (w / s + z).round().clamp(0, mv)
            dq = q - q.mean(1, True)
            s = ((dq * (w - w.mean(1, True))).sum(1, True) / (dq * dq).sum(1, True).clamp_min(1e-9)).clamp_min(1e-9)
            z = q.mean(1, True) - w.mean(1, True) / s
        s, z = s.to(spec.meta_dtype).float(), z.to(spec.meta_dtype).float()
        q = (w / s + z).round().clamp(0, mv)
        e = (((q - z) * s - w) ** 2).sum(1, True)
        if best is None:
            best = e, q, s, z
        else:
            m = e < best[0]
            best = tuple(torch.where(m, a, b) for a, b in zip((e, q, s, z), best, strict=True))
    _, q, s, z = best
    return Quantized(
        reference.pack(q.to(torch.uint8).view(lay.units, -1), spec.nbits),
        s.view(lay.units, -1).to(spec.meta_dtype), z.view(lay.units, -1).to(spec.meta_dtype),
    )


def dequantize(q, layout, dtype):
    return reference.dequantize(q.W_q, q.scale, q.zero, layout, dtype)


def squared_error(W, q, layout):
    W = W.float()
    e = (W - dequantize(q, layout, torch.float32)).double().square().sum().item()
    return e, W.double().square().sum().item()
