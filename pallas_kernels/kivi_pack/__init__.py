"""The newest tokens of a row packed on a GPU, where they complete a group: what `kivi_attention` reads later.

    kivi_pack(k, v, start, counts, k_codes, k_scale, k_offset, v_codes, v_scale, v_offset, group=G) -> (the six,)

k and v `[B, K, R, H]` are rings that hold position p in slot p mod R, row b's newest tokens among them: counts[b], at
most G, from position start[b]. Where these complete group m = start[b] // G, and there is room for it, its G tokens are
written to place m of the row's packed groups, whose arrays are those of `kivi_attention`. A grid, of a channel of a
group's keys or of a run of channels of a value, begins at its smallest number, the offset, and its scale is the range
divided by 15 in bfloat16; codes are `(x - offset) / scale`, to the nearest and to even. What is not written stays, and
the arrays are changed in place where they are donated.

XLA has a loop over the rows that complete a group: a GPU asks the host after every turn, also after none.
"""

from pallas_kernels.kivi_pack.gpu import kivi_pack as gpu
from pallas_kernels.kivi_pack.reference import kivi_pack as reference

__all__ = ["gpu", "reference"]
