"""The newest tokens of a row packed into its pages on a GPU, where they complete a group.

    paged_kivi_pack(k, v, start, counts, table, codes, key_grids, value_grids, group=G) -> (the last three,)

What is packed, and how, is what `kivi_pack` says. Group m of row b goes to its place in page `table[b, m * G // page]`
of the arrays of `paged_kivi_attention`. Of the table `[B, M]` only the entries of groups that are written are read.
"""

from pallas_kernels.paged_kivi_pack.gpu import paged_kivi_pack as gpu
from pallas_kernels.paged_kivi_pack.reference import paged_kivi_pack as reference

__all__ = ["gpu", "reference"]
