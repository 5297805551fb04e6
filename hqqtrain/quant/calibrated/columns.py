"""Quantize adjacent columns of a weight with known scales, and pass their errors on."""

from torch import Tensor

from hqqtrain_kernels import backend


def quantize_columns(
    W: Tensor,
    scale: Tensor,
    zero: Tensor,
    feedback: Tensor | None,
    codes: Tensor,
    errors: Tensor,
    *,
    nbits: int,
    group_columns: int,
) -> None:
    """Quantize the first columns of W, which are as many as `codes` has.

    Args:
        W: fp32 [columns, rows of a unit, units]. The columns behind the quantized ones get their
            errors; the quantized ones are undefined afterwards.
        scale: Stored scales [groups, units]; `group_columns` columns share a group.
        zero: Stored zeros [groups, units].
        feedback: fp32 [quantized columns, columns], zero on and below the diagonal: by how much an
            error of 1 in a quantized column changes each column; None: by nothing.
        codes: uint8 [quantized columns, rows of a unit, units]; it is overwritten.
        errors: fp32, of the shape of `codes`; with feedback it is overwritten.
        nbits: Bits of a code.
        group_columns: Columns that share a scale and a zero.
    """
    if feedback is not None and backend.use_triton(W.device):
        from hqqtrain_kernels import feedback_triton  # triton is absent on a Mac

        feedback_triton.quantize_columns(
            W, scale, zero, feedback, codes, errors, nbits=nbits, group_columns=group_columns
        )
        return
    scale, zero = scale[:, None].float(), zero[:, None].float()  # [groups, 1, units]
    step = group_columns if feedback is None else 1
    for first in range(0, len(codes), step):
        last, group = min(first + step, len(codes)), first // group_columns
        code = (W[first:last] / scale[group]).add_(zero[group])
        codes[first:last] = code.round_().clamp_(0, (1 << nbits) - 1)
        if feedback is not None:
            error = W[first] - code[0].sub_(zero[group]).mul_(scale[group])
            errors[first] = error
            W[last:].flatten(1).addr_(feedback[first, last:], error.flatten())
