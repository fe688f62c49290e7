"""Mends of Triton 3.6's interpreter, which runs the kernels where no GPU is: BF16 that it cuts off or multiplies as if
its bits were integers, E4M3 that it rounds wrongly and whose NaN it takes for 480, and loops whose bounds are scalars,
which numpy 2.4 refuses it.
What it does again and again is done once: tests of kernels take a third of the time. Called by conftest.py.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    builder: Any = interpreter.InterpreterBuilder
    patch, dot, cast = interpreter._patch_lang_tensor, builder.create_dot, builder.cast_impl
    convert = builder.create_fp_to_fp
    handle = interpreter.TensorHandle

    def patch_with_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widen(x: Any) -> Any:
        """A handle of BF16 numbers, kept as their bits, as one of f32."""
        if x.dtype.scalar != tl.bfloat16:
            return x
        return handle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot_of_numbers(self: Any, a: Any, b: Any, *others: Any) -> Any:
        return dot(self, widen(a), widen(b), *others)

    def cast_with_rounding(self: Any, src: Any, dst_type: Any, *rounding: Any) -> Any:
        if src.dtype.scalar == tl.float8e4nv:
            numbers = torch.from_numpy(np.ascontiguousarray(src.data)).view(torch.float8_e4m3fn).float()
            if dst_type.scalar == tl.float16:  # which holds each of them
                return handle(numbers.half().numpy(), tl.float16)
            src = handle(numbers.numpy(), tl.float32)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.int16)
            return handle(rounded.numpy().view(np.uint16), tl.bfloat16)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
            codes = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.float8_e4m3fn).view(torch.uint8)
            return handle(codes.numpy(), tl.float8e4nv)
        if rounding:
            return convert(self, src, dst_type, *rounding)
        return cast(self, widen(src) if dst_type.scalar == tl.float32 else src, dst_type)

    interpreter._patch_lang_tensor = patch_with_index
    builder.create_dot = dot_of_numbers
    builder.cast_impl = cast_with_rounding
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc", "fp_to_fp"):
        setattr(builder, f"create_{name}", cast_with_rounding)
    hasten()


def hasten() -> None:
    """Of a launch's time, two thirds went into what is the same each time: the functions of `tl` were replaced at every
    call of every function, types were made and named anew, and sums were watched for an overflow that nothing reports.
    """
    replace_functions = interpreter._patch_lang
    no_scope = interpreter._LangPatchScope()  # nothing to restore: here the functions of `tl` run nowhere else

    @functools.cache
    def replace_once() -> None:
        replace_functions(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))

    def replace_functions_once(fn: Any) -> Any:
        replace_once()
        return no_scope

    interpreter._patch_lang = replace_functions_once
    for kind in (tl.block_type, tl.pointer_type):  # which have only __eq__; equal types have one name
        kind.__hash__ = tl.dtype.__hash__
    interpreter._get_np_dtype = functools.cache(interpreter._get_np_dtype)
    tl.block_type.with_element_ty = functools.cache(tl.block_type.with_element_ty)
    semantic: Any = interpreter.interpreter_semantic
    options = dataclasses.replace(semantic.builder.options, sanitize_overflow=False)  # checked only with `debug`
    semantic.builder.options = options

    @functools.cache
    def describe(shape: tuple[int, ...]) -> tuple[Any, Any]:
        made = original_tensor(None, tl.block_type(tl.int8, list(shape)) if shape else tl.int8)
        return made.shape, made.numel

    original_tensor, make = tl.tensor, tl.tensor.__init__

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        if handle is None:
            make(self, handle, type)
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = describe(tuple(type.shape) if type.is_block() else ())

    tl.tensor.__init__ = init_tensor
    hasten_types()


def hasten_types() -> None:
    """What is left goes into types, not numbers: of a model's kernels 40 % into shapes and constants that were looked
    through, types that were compared by name, and calls that were handed on twice.
    """
    core, semantic = tl.core, interpreter.interpreter_semantic
    unwrap, init_block, equal = core._unwrap_if_constexpr, tl.block_type.__init__, tl.dtype.__eq__
    plain = {int, float, bool, str, type(None), tl.dtype, tl.block_type, tl.pointer_type, tl.tensor}
    blocks: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    results: dict[tuple[Any, ...], Any] = {}
    kind = type(semantic)
    find_type, broadcast = kind.computation_type_impl, kind.broadcast_impl_value
    operands = kind.binary_op_type_checking_impl
    numbers = {tl.float32, tl.int32, tl.int64}  # two of one of these are neither cast nor refused

    def unwrap_fast(o: Any) -> Any:
        if type(o) in plain:
            return o
        return o.value if type(o) is tl.constexpr else unwrap(o)

    def init_block_once(self: Any, element_ty: Any, shape: Any) -> None:
        key = element_ty.name, tuple([s.value if type(s) is tl.constexpr else s for s in shape])
        if key not in blocks:
            init_block(self, element_ty, shape)
            blocks[key] = dict(vars(self))
        vars(self).update(blocks[key])

    def find_type_once(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in results:
            results[key] = find_type(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return results[key]

    def broadcast_unlike(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        alike = b.is_block() and a.shape.values == b.shape.values if a.is_block() else not b.is_block()
        return (lhs, rhs) if alike else broadcast(self, lhs, rhs)

    def find_operands(self: Any, lhs: Any, rhs: Any, *how: Any, **named: Any) -> Any:
        if type(lhs) is tl.tensor is type(rhs) and lhs.dtype is rhs.dtype and lhs.dtype in numbers:
            return broadcast_unlike(self, lhs, rhs)
        return operands(self, lhs, rhs, *how, **named)

    def call_directly(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = getattr(member, "__wrapped__", member)  # what is around it asks whether `_semantic` is there

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(obj, name, call)

    core._unwrap_if_constexpr = unwrap_fast
    tl.block_type.__init__ = init_block_once
    tl.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    kind.computation_type_impl, kind.broadcast_impl_value = find_type_once, broadcast_unlike
    kind.binary_op_type_checking_impl = find_operands
    interpreter.TensorHandle.__post_init__ = lambda self: None  # numpy's and Triton's sizes, compared at each result
    interpreter._patch_attr = call_directly
