"""Puts the repaired classes in the place of Triton's own."""

from triton.runtime import interpreter as base

from bench.tools.interpreter.builder import Builder, Semantic
from bench.tools.interpreter.executor import Executor
from bench.tools.interpreter.language import Rewriter, call_device_function, logical, negated, np_dtype, patch_tensor
from bench.tools.interpreter.reductions import Reduce, Scan


def install() -> None:
    """Repair the interpreter of this process. Call once, before the first launch."""
    builder = Builder()
    base.InterpreterBuilder = Builder
    base.TritonSemantic = Semantic
    base.interpreter_builder = builder
    base.interpreter_semantic = Semantic(builder)
    base.ReduceOps, base.ScanOps = Reduce, Scan
    base.GridExecutor = Executor
    base.FunctionRewriter.ast_transformer = Rewriter()
    base._repaired_logical, base._repaired_not = (
        logical,
        negated,
    )  # Triton shows its module's names to rewritten kernels
    base._get_np_dtype = np_dtype
    base._patch_lang_tensor = patch_tensor
    base.InterpretedFunction.__call__ = call_device_function
