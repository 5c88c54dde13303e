"""The `triton.language` that a kernel sees: swapped in for a launch, back out after it."""

import ast
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.language import core  # noqa: F401  (see _everything)
from triton.runtime import interpreter as base

from bench.tools.interpreter import state
from bench.tools.interpreter.defects import Unsupported

_TRITON = str(Path(triton.__file__).parent)
_call = base.InterpretedFunction.__call__
_patch_lang_tensor = base._patch_lang_tensor


def _everything() -> None:
    """Stand for a function whose globals show all of the language: `tl` and `tl.core`."""


class Language:
    """Context manager that patches the language once.

    Triton's own patching searches the whole language at every call of every device function, which takes longer than
    most kernels; here later launches only swap attributes.
    """

    _swaps: list[tuple[Any, str, Any, Any]] | None = None  # object, name, outside (_MISSING if absent), inside

    def __enter__(self) -> None:
        if Language._swaps is None:
            scope = base._patch_lang(_everything)
            Language._swaps = [(owner, name, was, getattr(owner, name)) for owner, name, was in scope._changes]
            return
        for owner, name, _, inside in Language._swaps:
            setattr(owner, name, inside)

    def __exit__(self, *error: object) -> None:
        for owner, name, outside, _ in reversed(Language._swaps or []):
            if outside is base._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, outside)


def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`InterpretedFunction.__call__`: within a launch everything is in place already, and errors keep their place."""
    if state.current is None:
        return _call(self, *args, **kwargs)
    return self.rewrite()(*args, **kwargs)


_np_dtypes: dict[str, np.dtype] = {}
_np_dtype = base._get_np_dtype


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """`_get_np_dtype`, which Triton asks for every operation, remembered by the name of the scalar type."""
    scalar = dtype.scalar
    if scalar.is_ptr():
        return np.dtype(np.uint64)
    known = _np_dtypes.get(scalar.name)
    if known is None:
        known = _np_dtypes[scalar.name] = _np_dtype(scalar)
    return known


def patch_tensor(tensor: Any, scope: Any) -> None:
    """Give tensors what Python asks of them. As a loop bound: NumPy from 2.4 on wants a real scalar there."""
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
    scope.set_attr(tensor, "__bool__", _truth)


def _truth(value: Any) -> bool:
    if sys._getframe(1).f_code.co_filename.startswith(_TRITON):  # Triton itself asks so whether a value is None
        return True
    if value.handle.data.size != 1:
        raise Unsupported(f"a block of shape {value.handle.data.shape} as a condition: only scalars can be one")
    return bool(value.handle.data.item())


def logical(method: str, *operands: Callable[[], Any]) -> Any:
    """`and` and `or` as the compiler sees them: elementwise on tensors, Python's own on values it knows."""
    result = operands[0]()
    for operand in operands[1:]:
        known = result.value if isinstance(result, tl.constexpr) else result
        if not isinstance(known, tl.tensor):
            if bool(known) == (method == "logical_or"):
                return result
            result = operand()
            continue
        result = getattr(tl.tensor, method)(known, operand())
    return result


def negated(value: Any) -> Any:
    """`not` as the compiler sees it."""
    return value.__not__() if isinstance(value, tl.tensor) else not value


class Rewriter(base.ASTTransformer):
    """Turns `and`, `or` and `not` of a kernel into calls: Python would ask a block for its truth value."""

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.AST:
        """Turn `a and b` into `logical("logical_and", lambda: a, lambda: b)`."""
        self.generic_visit(node)
        nothing = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        name = ast.Constant(value="logical_and" if isinstance(node.op, ast.And) else "logical_or")
        call = ast.Call(
            ast.Name("_repaired_logical", ast.Load()), [name, *(ast.Lambda(nothing, x) for x in node.values)], []
        )
        return ast.copy_location(call, node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        """`not a` -> `negated(a)`."""
        self.generic_visit(node)
        if not isinstance(node.op, ast.Not):
            return node
        return ast.copy_location(ast.Call(ast.Name("_repaired_not", ast.Load()), [node.operand], []), node)

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        """Chains are refused: Triton compiles them from 3.9 on only."""
        self.generic_visit(node)
        if len(node.ops) > 1:
            raise Unsupported(f"line {node.lineno} of the kernel: a chain of comparisons; write them out with &")
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        """Triton's own transformation, but of what the value has become."""
        self.generic_visit(node)
        return super().visit_Assign(node)
