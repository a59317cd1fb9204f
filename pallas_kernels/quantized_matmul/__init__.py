"""Product of a few rows with a quantized weight that lies outputs first, as a model stores it.

    quantized_matmul(x, values, scale, qtype=...) -> y [M, O], in x's dtype

    y[m, o] = sum_i x[m, i] * (code[o, i] * scale[g(i), o] + offset[g(i), o])

x `[M, I]` is float32 or bfloat16. `scale` and `offset` (or None) are `[G, O]`, float32 or bfloat16, TRANSPOSED: one row
for each group of I / G inputs, g(i) = i // (I / G); G = 1 is a scale an output. `qtype` says what `values` hold:

- "int8": int8 `[O, I]`, -128..127;  "float8_e4m3fn": those `[O, I]`, or their bits as uint8;
- "int4": uint8 `[O, I / 2]`, two's complement -8..7;  "uint4": the same, 0..15. Of each run of 32 inputs byte j holds
  input j in its low nibble and input j + 16 in its high one (`jaxinfer.ops.quantized.Packed`); 32 divides I and I / G.

`activations="int8"` rounds x to integers first, round(x / step), step = max |x| / 127 over each row and group, and
multiplies integers. Otherwise the products lose less than a bfloat16 x has lost already: where a chip multiplies
int8 faster, a bfloat16 x of a four-bit weight is taken in steps of max |x| / 16,256 over a row and group.
Sums are float32 and are rounded once. `gpu` takes up to 64 rows of bfloat16 or float16, and no float32.
(LLM.int8(), 2208.07339; AWQ, 2306.00978; SmoothQuant, 2211.10438.)
"""

from pallas_kernels.quantized_matmul.gpu import quantized_matmul as gpu
from pallas_kernels.quantized_matmul.reference import quantized_matmul as reference
from pallas_kernels.quantized_matmul.tpu import quantized_matmul as tpu

__all__ = ["gpu", "reference", "tpu"]
