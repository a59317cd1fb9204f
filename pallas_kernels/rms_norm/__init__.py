"""Root-mean-square normalization of a few rows, and of the sum that a residual becomes, on a GPU.

    rms_norm(x, scale, eps=...) -> y [M, D]
    rms_norm(x, scale, eps=..., add=z) -> (x + z, y)

y[m] = s[m] / sqrt(mean(s[m]^2) + eps) * scale in float32, rounded once, where s is x `[M, D]`, or x + z rounded to x's
dtype. x and z are bfloat16 or float16, `scale` `[D]` float32 or as x. With one row XLA makes three kernels of it, whose
launches take longer than their work. On TPUs XLA fuses it with what is before and after, and there is no kernel.
(1910.07467.)
"""

from pallas_kernels.rms_norm.gpu import rms_norm as gpu
from pallas_kernels.rms_norm.reference import rms_norm as reference

__all__ = ["gpu", "reference"]
