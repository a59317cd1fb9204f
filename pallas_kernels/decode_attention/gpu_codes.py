"""From the bytes of a quantized cache to what Hopper's matrix units multiply."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat

BYTES = plgpu.Layout.WGMMA_UPCAST_2X  # four bytes beside each other in a thread
# Of every four float8 numbers two to a register: their bits put where bfloat16 has them, and the exponents' difference
# multiplied in, which makes numbers without a leading one right too. NaN becomes 480.
_FLOAT8 = """
{
.reg .b32 x, sign;
.reg .b32 scale;
mov.b32 scale, 0x7b807b80;
prmt.b32 x, $2, 0, 0x1404;
and.b32 sign, x, 0x80008000;
shr.b32 x, x, 4;
and.b32 x, x, 0x07f007f0;
or.b32 x, x, sign;
mul.rn.bf16x2 $0, x, scale;
prmt.b32 x, $2, 0, 0x3424;
and.b32 sign, x, 0x80008000;
shr.b32 x, x, 4;
and.b32 x, x, 0x07f007f0;
or.b32 x, x, sign;
mul.rn.bf16x2 $1, x, scale;
}
"""


def widen(ref: Any, layout: Any = None) -> Any:
    """Return what a ref holds, `[slots, H]` in int8 or float8_e4m3fn, as bfloat16; in `layout`, or any for None."""
    codes = compat.load(ref, BYTES, optimized=True)
    wide = codes.astype(jnp.bfloat16) if codes.dtype == jnp.int8 else _from_float8(codes)
    return wide if layout is None else plgpu.layout_cast(wide, layout)


def _from_float8(codes: Any) -> Any:
    @plgpu.inline_mgpu(arg_types=(BYTES,), return_type=plgpu.ShapeDtypeStruct(codes.shape, jnp.bfloat16, layout=BYTES))
    def convert(_: Any, x: Any) -> Any:
        ir, llvm, utils = compat.mlir()
        word, bfloat16 = ir.IntegerType.get_signless(32), ir.BF16Type.get()
        pair = ir.VectorType.get((2,), bfloat16)
        found = np.empty_like(x.registers)
        for at, register in np.ndenumerate(x.registers):
            both = llvm.inline_asm(
                llvm.StructType.get_literal([word, word]), [utils.bitcast(register, word)], _FLOAT8, "=r,=r,r"
            )
            halves = [utils.bitcast(llvm.extractvalue(word, both, (i,)), pair) for i in range(2)]
            found[at] = utils.vector_concat(halves)
        return mgpu.FragmentedArray(_registers=found, _layout=x.layout, _is_signed=None)

    return convert(codes)
