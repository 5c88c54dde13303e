"""The gradient ops in Triton: names and arguments of `dia_kernels.reference.gradients`."""

from dia_kernels.autograd.cross_entropy import cross_entropy
from dia_kernels.autograd.glu_backward import glu_backward
from dia_kernels.autograd.rms_norm_backward import rms_norm_backward
from dia_kernels.triton.glu import glu
from dia_kernels.triton.rms_norm import rms_norm
from dia_kernels.triton.rotate import rotate

name = "triton"

__all__ = ["cross_entropy", "glu", "glu_backward", "rms_norm", "rms_norm_backward", "rotate"]
