"""The body of decode attention on Hopper: one warpgroup takes a share of a row's live blocks, for one key head.

Slots are the rows of the matrix units, which take 64 at a time, and queries the columns, of which 8 are enough: few
queries waste nothing, and registers hold only what they need. The products are `K q^T`, `[slots, columns]`, and
`V^T p^T`, `[H, columns]`. The maximum over slots is taken across warps; the total is kept apart in every thread, to
be added up once at the end.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import compat
from pallas_kernels.decode_attention.gpu_codes import widen

LOG2E = math.log2(math.e)
NOTHING = -1e30  # the score of a slot that is not seen
LEAST = -1e20  # where the peak begins: what is not seen has a weight of exactly 0, also before anything is seen
MATRIX = plgpu.Layout.WGMMA
BY_SLOT, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)  # a number for every slot, and for every query


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of one call. Row r of the `rows` query rows of a key head is token `r % tokens`."""

    kv_heads: int
    rows: int
    columns: int  # query rows of one block of the grid
    tokens: int
    capacity: int  # slots that a row of the cache has at most
    slots: int
    stages: int
    splits: int
    H: int
    dtype: Any  # of the products
    stored: Any  # of the cache
    scales: Any  # of its scales, or None
    out_dtype: Any
    scale: float
    softcap: float | None
    window: int | None
    sinks: int
    tree_words: int  # 32 nodes each; 0 where there is no tree
    with_lse: bool
    overlap: bool  # with the kernels before and after: begins before the one before has ended, and waits for that
    has_start: bool
    has_position: bool

    @property
    def width(self) -> int:
        """The head's numbers in shared memory, in whole tiles; past H a copy fills in zeros."""
        return -(-self.H // 64) * 64

    @property
    def tiles(self) -> int:
        """Blocks of the grid that share a key head's cache."""
        return -(-self.rows // self.columns)

    @property
    def quantized(self) -> bool:
        """Whether the cache has scales."""
        return self.scales is not None


def scratch(plan: Plan, copies: int) -> dict[str, Any]:
    """Return the shared memory and the barriers; a block of keys, or values, comes in `copies` copies."""
    stage = (plan.stages, plan.slots, plan.width)
    queries, keys = swizzle(plan.H, plan.dtype), swizzle(plan.H, plan.stored)
    beside = 128 if plan.quantized else keys  # both operands of a product are laid out alike
    found = {
        "q": _tiled((plan.columns, plan.width), plan.dtype, queries),
        "k": _tiled(stage, plan.stored, keys),
        "v": _tiled(stage, plan.stored, keys),
        "weights": _tiled((plan.columns, plan.slots), plan.dtype, beside),
        "out": plgpu.SMEM((plan.columns, plan.width), plan.out_dtype),
        "q_barrier": plgpu.Barrier(),
    }
    if plan.quantized:
        found["wide"] = _tiled((plan.slots, plan.width), plan.dtype, beside)
        found |= {name: plgpu.SMEM((plan.stages, plan.slots), plan.scales) for name in ("k_scale", "v_scale")}
    barriers = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages)
    return found | {"k_barrier": barriers, "v_barrier": barriers}


def swizzle(H: int, dtype: Any) -> int:
    """Return the bytes of a line of a tile in shared memory: the most of which a head is a multiple.

    Raises:
        NotImplementedError: there is no such number.
    """
    size = jnp.dtype(dtype).itemsize
    for found in (128, 64, 32):
        if H * size % found == 0:
            return found
    raise NotImplementedError(f"H={H} of {dtype}: must be a multiple of {32 // size} on a GPU")


def _tiled(shape: tuple[int, ...], dtype: Any, line: int) -> Any:
    transforms = (plgpu.TilingTransform((8, line // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(line))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def body(plan: Plan, source: Any, refs: dict[str, Any], memory: dict[str, Any]) -> None:
    """Attend to a split's share of a row; `source` finds the blocks of keys and values, and starts to copy them."""
    if plan.overlap:
        plgpu.griddepcontrol_wait()
        plgpu.griddepcontrol_launch_dependents()
    group, tile = _divide(jax.lax.axis_index("rows"), plan.tiles)
    b, head = _divide(group, plan.kv_heads)
    split = jax.lax.axis_index("splits")
    first_column = tile * plan.columns
    columns = pl.ds(first_column, plan.columns)
    # Past the last row and past H a copy fills in zeros; where it begins is not known when it is compiled, or jax
    # would not allow it.
    width = pl.ds(group * 0, plan.width)
    plgpu.copy_gmem_to_smem(refs["q"].at[group, columns, width], memory["q"], memory["q_barrier"])
    at = _Range(plan, refs, b)
    begin, end = at.share(split)

    def place(item: Any) -> Any:
        return source.find(refs, b, head, at.base_of(item), at.end)

    def load(item: Any, where: Any, name: str) -> None:
        source.copies(refs, memory, name, where, jax.lax.rem(item - begin, plan.stages))

    for ahead in range(plan.stages):

        @pl.when(begin + ahead < end)
        def _(ahead=ahead):
            where = place(begin + ahead)
            load(begin + ahead, where, "k")
            load(begin + ahead, where, "v")

    plgpu.barrier_wait(memory["q_barrier"])
    mask = _Mask(plan, refs, at, b, first_column)

    def step(item: Any, carry: Any) -> Any:
        acc, peak, total = carry
        stage, base = jax.lax.rem(item - begin, plan.stages), at.base_of(item)
        whole = at.whole(base)
        later = item + plan.stages
        more, where = later < end, place(later)  # looked up early: it is not waited for
        scores = _scores(plan, memory, stage)

        @pl.when(more)
        def _():
            load(later, where, "k")

        scores = jax.lax.cond(whole, lambda x: x, lambda x: jnp.where(mask.seen(base), x, NOTHING), scores)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=0))
        weights = jnp.exp2(scores - _wide(new_peak, scores.shape, 1))
        shrink = jnp.exp2(peak - new_peak)
        total = total * _wide(shrink, total.shape, 1)
        for part in range(plan.slots // 64):
            total = total + weights[64 * part : 64 * (part + 1)]
        acc = _mixed(plan, memory, stage, whole, mask.alive(base), weights, acc * _wide(shrink, acc.shape, 1))

        @pl.when(more)
        def _():
            load(later, where, "v")

        return acc, new_peak, total

    zeros = _filled((plan.width, plan.columns), 0.0, MATRIX), _filled((64, plan.columns), 0.0, MATRIX)
    acc, peak, total = jax.lax.fori_loop(
        begin, end, step, (zeros[0], _filled((plan.columns,), LEAST, BY_COLUMN), zeros[1])
    )
    total = jnp.sum(total, axis=0)
    nothing = total == 0.0
    safe = jnp.where(nothing, 1.0, total)
    acc = acc * _wide(1.0 / safe, acc.shape, 1)
    turned = plgpu.layout_cast(acc.astype(plan.out_dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    compat.transposed(memory["out"])[...] = turned
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(memory["out"], refs["out"].at[group, split, columns, width])
    if plan.with_lse:
        lse = jnp.where(nothing, -jnp.inf, peak * (1 / LOG2E) + jnp.log(safe))
        refs["lse"].at[group, split, columns][...] = lse
    plgpu.wait_smem_to_gmem(0)


def _scores(plan: Plan, memory: dict[str, Any], stage: Any) -> Any:
    """Return the scores of a block in base 2, `[slots, columns]`."""
    plgpu.barrier_wait(memory["k_barrier"].at[stage])
    keys = memory["k"].at[stage]
    if plan.quantized:
        keys = widen(keys, MATRIX)
    found = multiply(None, keys, compat.transposed(memory["q"]))
    factor = plan.scale * LOG2E if plan.softcap is None else plan.scale / plan.softcap
    if plan.quantized:
        steps = compat.load(memory["k_scale"].at[stage], BY_SLOT).astype(jnp.float32)
        found = found * _wide(steps * factor, found.shape, 0)
    else:
        found = found * factor
    if plan.softcap is not None:
        # tanh(x) by the exponential: the hardware's own tanh has three digits.
        found = (plan.softcap * LOG2E) * (1.0 - 2.0 / (jnp.exp2(found * (2 * LOG2E)) + 1.0))
    return found


def _mixed(plan: Plan, memory: dict[str, Any], stage: Any, whole: Any, alive: Any, weights: Any, acc: Any) -> Any:
    """Return `acc`, `[H, columns]`, and to it the block's values under the weights; zero where nothing is alive."""
    plgpu.barrier_wait(memory["v_barrier"].at[stage])
    values = memory["v"].at[stage]
    if plan.quantized:
        steps = compat.load(memory["v_scale"].at[stage], BY_SLOT).astype(jnp.float32)
        steps = jax.lax.cond(whole, lambda x: x, lambda x: jnp.where(alive((plan.slots,), BY_SLOT), x, 0.0), steps)
        weights = weights * _wide(steps, weights.shape, 0)
        memory["wide"][...] = widen(values)
        values = memory["wide"]
    else:

        @pl.when(jnp.logical_not(whole))
        def _():
            # What nothing wrote may be NaN, which a weight of 0 does not undo.
            held = compat.load(values, MATRIX, optimized=True)
            values[...] = jnp.where(alive(held.shape, MATRIX), held, jnp.zeros((), held.dtype))

    turned = plgpu.layout_cast(weights.astype(plan.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
    compat.transposed(memory["weights"])[...] = turned
    plgpu.commit_smem()
    return multiply(acc, compat.transposed(values), compat.transposed(memory["weights"]))


def multiply(acc: Any, a: Any, b: Any) -> Any:
    """Return `acc + a b` in float32, without `acc` where it is None; a and b are refs, or a is held in registers."""
    if acc is None:

        def product(acc_ref: Any) -> Any:
            plgpu.wgmma(acc_ref, a, b)
            return acc_ref[...]

        return pl.run_scoped(product, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))

    def added(acc_ref: Any) -> None:
        plgpu.wgmma(acc_ref, a, b)

    return pl.run_state(added)(plgpu.ACC.init(acc))


class _Range:
    """Which blocks of slots row b has, and which of them a split takes.

    Items are the blocks in the order of their slots: those of the sinks, then from the window's first to the last.
    """

    def __init__(self, plan: Plan, refs: dict[str, Any], b: Any):
        self._plan = plan
        T, slots = plan.tokens, plan.slots
        self.length = jnp.minimum(refs["length"][b], plan.capacity)
        self.start = refs["start"][b] if plan.has_start else jnp.int32(0)
        self.position = refs["position"][b] if plan.has_position else refs["length"][b] - T
        low = self.lowest = jnp.maximum(self.start, 0)
        if plan.tree_words:
            self.end = jnp.maximum(self.length, 0)
            self._highest = self.length - T
        else:
            self.end = jnp.maximum(jnp.minimum(self.length, self.position + T), 0)
            self._highest = jnp.minimum(self.length, self.position + 1)
        if plan.window is not None:
            # The last query's window, the deepest of a tree at most T - 1 below, begins latest.
            low = jnp.maximum(low, self.position + 1 - plan.window)
            self.lowest = jnp.maximum(self.lowest, self.position + T - plan.window)
        self._first = jax.lax.div(low, jnp.int32(slots))
        count = jnp.maximum(jax.lax.div(self.end + (slots - 1), jnp.int32(slots)) - self._first, 0)
        self._apart = jnp.int32(0)
        if plan.window is not None and plan.sinks:
            wanted = jnp.minimum(self._first, -(-plan.sinks // slots))
            self._apart = jnp.where((self.start < plan.sinks) & (count > 0), wanted, 0)
        self._items = count + self._apart

    def share(self, split: Any) -> tuple[Any, Any]:
        """Return the first item of a split, and the one after its last."""
        each = jax.lax.div(self._items + (self._plan.splits - 1), jnp.int32(self._plan.splits))
        begin = jnp.minimum(split * each, self._items)
        return begin, jnp.minimum(begin + each, self._items)

    def base_of(self, item: Any) -> Any:
        """Return the first slot of an item."""
        if self._plan.window is None or not self._plan.sinks:
            return (self._first + item) * self._plan.slots
        return jnp.where(item < self._apart, item, self._first + item - self._apart) * self._plan.slots

    def whole(self, base: Any) -> Any:
        """Return whether all queries see all slots of the block that begins at `base`."""
        return (base >= self.lowest) & (base + self._plan.slots <= self._highest)


class _Mask:
    """Which slots of a block each query sees."""

    def __init__(self, plan: Plan, refs: dict[str, Any], at: _Range, b: Any, first_column: Any):
        self._plan, self._refs, self._at, self._b, self._first_column = plan, refs, at, b, first_column

    def seen(self, base: Any) -> Any:
        """Return `[slots, columns]`, bool."""
        plan, at = self._plan, self._at
        shape = (plan.slots, plan.columns)
        slot = base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX)
        seen = slot >= at.start
        if plan.tree_words:
            node = slot - (at.length - plan.tokens)
            words = [self._of_tree(i) for i in range(plan.tree_words + 1)]
            bits = words[0]
            for i in range(1, plan.tree_words):
                bits = jnp.where(node >= 32 * i, words[i], bits)
            inside = jax.lax.shift_right_logical(bits, node & 31) & 1
            seen = seen & ((node < 0) | ((node < plan.tokens) & (inside == 1)))
            position = at.length - plan.tokens + words[-1]
        else:
            row = self._first_column + plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
            position = at.position + (jax.lax.rem(row, plan.tokens) if plan.tokens > 1 else 0)
            seen = seen & (slot < at.length) & (slot <= position)
        if plan.window is not None:
            seen = seen & ((slot > position - plan.window) | (slot < plan.sinks))
        return seen

    def _of_tree(self, i: int) -> Any:
        columns = pl.ds(self._first_column, self._plan.columns)
        words = compat.load(self._refs["tree"].at[self._b, i, columns], BY_COLUMN)
        return _wide(words, (self._plan.slots, self._plan.columns), 1)

    def alive(self, base: Any) -> Any:
        """Return a function of a shape and its layout: whether slots, its first axis, hold something."""

        def of(shape: tuple[int, ...], layout: Any) -> Any:
            slot = base + plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=layout)
            return (slot >= self._at.start) & (slot < self._at.length)

        return of


def _divide(index: Any, by: int) -> tuple[Any, Any]:
    return jax.lax.div(index, jnp.int32(by)), jax.lax.rem(index, jnp.int32(by))


def _filled(shape: tuple[int, ...], value: float, layout: Any) -> Any:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _wide(x: Any, shape: tuple[int, ...], axis: int) -> Any:
    """Return a vector along `axis` of `shape`."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, shape, (axis,)), MATRIX)
