"""Makes Triton's interpreter several times as fast, with the same results.

The interpreter runs the programs of a kernel one after another in NumPy. For the small tensors of
our tests, some of its steps took more time than the arithmetic. They are replaced here.
"""

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_builder = interpreter.interpreter_builder
_RELEASED = (
    interpreter._get_np_dtype, interpreter._patch_lang, interpreter.ReduceOps.generic_reduce,
    tl.block_type.__init__, tl.tensor.__init__, TritonSemantic.broadcast_impl_value,
    _builder.options,
)  # fmt: skip
_without_overflow_checks = dataclasses.replace(_builder.options, sanitize_overflow=False)
"""Triton computes these checks of integers, and ignores their results unless it debugs a kernel.

Neither its compiler nor its interpreter debugs by default. The compiler then omits them as well.
"""
_np_dtype_of_number = functools.cache(interpreter._get_np_dtype)


def speed_up() -> None:
    """Replace the slow steps in this process."""
    _replace(
        _np_dtype, _patch_lang_once, _reduce_slices, _init_block_type, _init_tensor, _broadcast,
        _without_overflow_checks,
    )  # fmt: skip


@contextlib.contextmanager
def as_released() -> Iterator[None]:
    """Use the steps of the installed Triton for a while."""
    _replace(*_RELEASED)
    yield
    speed_up()


def _replace(
    get_np_dtype: Any, patch_lang: Any, generic_reduce: Any, init_block_type: Any,
    init_tensor: Any, broadcast: Any, options: Any,
) -> None:  # fmt: skip
    interpreter._get_np_dtype = get_np_dtype
    interpreter._patch_lang = patch_lang
    interpreter.ReduceOps.generic_reduce = generic_reduce
    tl.block_type.__init__ = init_block_type
    tl.tensor.__init__ = init_tensor
    TritonSemantic.broadcast_impl_value = broadcast
    _builder.options = options


def _np_dtype(dtype: tl.dtype) -> np.dtype:
    """Return the dtype of NumPy for a scalar, a pointer or a block, from a table made once."""
    if isinstance(dtype.scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    return _np_dtype_of_number(dtype.scalar)


def _patch_lang_once(fn: Any) -> Any:
    """Patch triton.language for `fn`, unless the kernel that calls `fn` has already done so."""
    modules = _language_modules(fn)
    if modules and not any(tl.core.is_builtin(module.load) for module in modules):
        return interpreter._LangPatchScope()  # it has nothing to restore
    return _RELEASED[1](fn)


@functools.cache
def _language_modules(fn: Any) -> list[Any]:
    return [m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]


def _reduce_slices(self: Any, inputs: tuple[tl.tensor, ...]) -> list[tl.tensor]:
    """Combine the slices along an axis in their order, and not element by element."""
    flat = self.axis is None
    tensors, axis = self.unravel(inputs, self.axis)
    arrays = [tensor.handle.data for tensor in tensors]
    shape = arrays[0].shape[:axis] + arrays[0].shape[axis + 1 :]
    pairs = list(zip(arrays, tensors, strict=True))
    slices = (
        tuple(self.to_tensor(array.take(i, axis), tensor.dtype) for array, tensor in pairs)
        for i in range(arrays[0].shape[axis])
    )

    def combine(total: tuple[tl.tensor, ...], following: tuple[tl.tensor, ...]) -> Any:
        combined = self.combine_fn.fn(*total, *following)
        return combined if isinstance(combined, tuple) else (combined,)

    results = [np.reshape(total.handle.data, shape) for total in functools.reduce(combine, slices)]
    if self.keep_dims:
        ndim = inputs[0].handle.data.ndim
        results = [r.reshape((1,) * ndim) if flat else np.expand_dims(r, axis) for r in results]
    return [self.to_tensor(r, tensor.dtype) for r, tensor in zip(results, tensors, strict=True)]


def _init_block_type(self: tl.block_type, element_ty: tl.dtype, shape: Sequence[Any]) -> None:
    """Take the attributes of an equal type from a table; types of pointers have no hash."""
    if isinstance(element_ty, tl.pointer_type):
        return _RELEASED[3](self, element_ty, shape)
    sizes = (size.value if isinstance(size, tl.constexpr) else size for size in shape)
    self.__dict__ = _attributes_of_block_type(element_ty, *sizes)


@functools.cache
def _attributes_of_block_type(element_ty: tl.dtype, *sizes: int) -> dict[str, Any]:
    made = tl.block_type.__new__(tl.block_type)
    _RELEASED[3](made, element_ty, list(sizes))
    return vars(made)


def _init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
    """Take the shape and the number of elements from a table."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape_of_tensor(*(type.shape if type.is_block() else ()))


@functools.cache
def _shape_of_tensor(*sizes: int) -> tuple[tl.tuple, tl.constexpr]:
    made = tl.tensor.__new__(tl.tensor)
    type = tl.block_type(tl.int1, list(sizes)) if sizes else tl.int1
    _RELEASED[4](made, None, type)
    return made.shape, made.numel


def _broadcast(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return blocks of one shape as they are."""
    are_blocks = lhs.type.is_block() and rhs.type.is_block()
    if are_blocks and lhs.type.shape.values == rhs.type.shape.values:
        return lhs, rhs
    return _RELEASED[5](self, lhs, rhs)
