"""The call of decode attention on Hopper, whatever holds the cache: queries are packed, splits merged."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import compat, gpus, tuning
from pallas_kernels.calls import Known
from pallas_kernels.decode_attention import gpu_body, gpu_cluster, gpu_warp_body
from pallas_kernels.decode_attention.gpu_cluster import Cluster
from pallas_kernels.decode_attention.gpu_merge import MOST_SPLITS, by_xla, merge
from pallas_kernels.decode_attention.gpu_plan import Groups, Plan, by_warps, scratch, swizzle

MOST_COLUMNS = {64: 64, 128: 64, 192: 32, 256: 32}  # by the head's width: what registers hold with no spills
RESERVED = 6 * 1024  # bytes of shared memory a block that the hardware and the reductions take
CLUSTERED = 8  # blocks of a cluster at most where nothing is said of it: of 16 too few are placed at once


def attend_rows(
    name: str,
    q: Float[Array, "B T N H"],
    source: Any,
    kv_heads: int,
    capacity: int,
    length: Int[Known, "B"],
    *,
    scale: float,
    start: Int[Known, "B"] | None,
    position: Int[Known, "B"] | None,
    window: int | None,
    sinks: int,
    softcap: float | None,
    tree: Bool[Known, "... T T"] | None,
    return_lse: bool,
    ring: bool = False,
    blocks: dict[str, int] | None,
    interpret: Any,
):
    """Return the output, or (output, log-sum-exp).

    `capacity` is the number of slots that a row has at most, which are a `ring` or not; `source` has the `arrays` that
    hold them. Of packed `groups`, blocks of 8 query rows each read the whole cache of their key head.

    Raises:
        NotImplementedError: dtypes or sizes that the kernel does not take.
        ValueError: both position and tree, or blocks that ask for a cluster of a size that there is not.
    """
    if tree is not None and position is not None:
        raise ValueError("position and tree: a tree's own slots give the positions of its queries")
    B, T, N, H = q.shape
    K = kv_heads
    rows = N // K * T
    stored, scales = source.dtypes
    dtype = jnp.dtype(jnp.bfloat16) if scales is not None else stored
    check(q.dtype, stored, scales, H, source.groups)
    if interpret and source.groups is not None:
        raise NotImplementedError(f"{name}: its instructions are the hardware's own, which no interpreter has")
    width = -(-H // 64) * 64
    columns = 8 if source.groups is not None else min(-(-rows // 8) * 8, MOST_COLUMNS[width])
    grid = B * K * -(-rows // columns)
    tuned = tuning.gpu_blocks(name, gpus.current().name, block_class(stored, B * K, rows, capacity, H))
    warps = by_warps(scales, columns, H) and not interpret  # which groups always are
    if "splits" in (blocks or {}):
        tuned.pop("cluster", None)  # goes with the table's splits
    chosen = blocks_for(grid, capacity, width, columns, stored, scales, tuned | (blocks or {}), warps, source.groups)
    slots = source.fit(chosen["slots"])
    splits = chosen["splits"]
    together = chosen["cluster"] and splits > 1 and not interpret
    cluster = Cluster(splits, columns, width, rows, H) if together else None
    apart = splits > 1 and cluster is None
    plan = Plan(
        kv_heads=K, rows=rows, columns=columns, tokens=T, capacity=capacity, slots=slots, stages=chosen["stages"],
        splits=splits, cluster=cluster, H=H, dtype=dtype, stored=stored, scales=scales, groups=source.groups,
        out_dtype=jnp.dtype(jnp.float32 if apart else q.dtype), scale=scale, softcap=softcap,
        window=window, sinks=sinks, tree_words=0 if tree is None else -(-T // 32),
        with_lse=return_lse or apart, overlap=bool(chosen["overlap"]) and not interpret,
        has_start=start is not None, has_position=position is not None, ring=ring, plain=bool(interpret),
    )  # fmt: skip
    packed = q.astype(dtype).reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B * K, rows, H)
    if rows > 8 and rows % 8:  # a copy fills in what is past an axis' end only where that is the end of a tile of 8
        packed = jnp.pad(packed, ((0, 0), (0, plan.tiles * columns - rows), (0, 0)))
    inputs = {"q": packed, "length": jnp.asarray(length, jnp.int32)}
    if start is not None:
        inputs["start"] = jnp.asarray(start, jnp.int32)
    if position is not None:
        inputs["position"] = jnp.asarray(position, jnp.int32)
    if tree is not None:
        inputs["tree"] = _tree_words(jnp.asarray(tree), B, N // K, plan)
    found = _call(name, plan, source, inputs | source.arrays, interpret)
    if apart:
        out, lse = (by_xla if interpret else merge)(found["out"], found["lse"], rows, q.dtype, plan.overlap)
    else:
        out, lse = found["out"][..., :rows, :], found["lse"][..., :rows] if return_lse else None

    def ungroup(x):
        return x.reshape(B, K, N // K, T, -1).transpose(0, 3, 1, 2, 4).reshape(B, T, N, -1)

    return (ungroup(out), ungroup(lse)[..., 0]) if return_lse else ungroup(out)


def check(queries: Any, stored: Any, scales: Any, H: int, groups: Groups | None = None) -> None:
    """Raise NotImplementedError for dtypes and heads that the kernel does not take."""
    if queries not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"q of {queries}: must be bfloat16 or float16 on a GPU")
    if scales is None and stored not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"a cache of {stored} without scales: must be bfloat16 or float16 on a GPU")
    if groups is not None:
        _check_groups(groups, scales, H)
    elif scales is not None and stored not in (jnp.int8, jnp.float8_e4m3fn):
        raise NotImplementedError(f"a cache of {stored} with scales: must be int8 or float8_e4m3fn on a GPU")
    if H > 256:
        raise NotImplementedError(f"H={H}: must be at most 256 on a GPU")
    swizzle(H, queries), swizzle(H, stored)


def _check_groups(groups: Groups, grids: Any, H: int) -> None:
    if grids not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"grids of {grids}: must be bfloat16 or float32 on a GPU")
    if H % 64 or H // groups.runs % 32:
        raise NotImplementedError(f"H={H} in {groups.runs} runs: must be a multiple of 64, and runs of 32, on a GPU")
    if groups.size not in (32, 64, 128, 256):
        raise NotImplementedError(f"group={groups.size}: must be 32, 64, 128 or 256 tokens on a GPU")


def block_class(stored: Any, heads: int, rows: int, capacity: int, H: int) -> dict[str, int | str]:
    """Return the key of the table of blocks: `heads` are the key heads of all rows, `rows` the queries of one."""
    form = f"{jnp.dtype(stored).name}_h{H}_{'few' if rows <= 8 else 'many'}"
    return {"form": form, "heads": heads, "rows": rows, "S": capacity}


def blocks_for(
    grid: int,
    capacity: int,
    width: int,
    columns: int,
    stored: Any,
    scales: Any,
    given: dict[str, int],
    warps: bool = False,
    groups: Groups | None = None,
) -> dict[str, int]:
    """Return the blocks: those given, by default two resident on a processor or one, and splits that fill all once.

    `grid` is the number of blocks of the grid that a split takes; of those whose warps attend each for itself, `warps`,
    two or three are resident. Of a few, the splits are a cluster each, which half of the processors are enough for.

    Raises:
        ValueError: a cluster of as many splits as are given is not to be had.
    """
    gpu = gpus.current()
    memory = functools.partial(_memory, width, columns, stored, scales, warps, groups)
    if grid * CLUSTERED <= gpu.processors and not given.keys() - {"overlap"}:
        wide = {"slots": 256 if warps else 128, "stages": 2, "cluster": 1}
        fixed, stage = memory(wide["slots"])
        given = given | (wide if fixed + wide["stages"] * stage <= gpu.shared else {})
    slots = given.get("slots", _slots(width, warps, groups))
    if groups is not None and (slots not in (128, 256) or slots % groups.size or given.get("stages", 2) < 2):
        raise ValueError(
            f"blocks={given}: slots must be 128 or 256, whole groups of {groups.size}, and stages 2 or more"
        )
    fixed, stage = memory(slots)
    wanted, most = 2, 4
    if warps and slots % 128 == 0:
        few = stored == jnp.int8 if groups is None else slots == 128  # registers
        wanted = most = 3 if few and width <= 128 else 2
    shared = (gpu.shared // wanted - fixed) // stage
    stages = given.get("stages", min(4, shared if shared >= 2 else (gpu.shared - fixed) // stage))
    resident = max(1, min(most, gpu.shared // (fixed + stages * stage)))
    splits = max(1, min(gpu.processors * resident // grid, -(-capacity // (2 * slots)), MOST_SPLITS))
    if given.get("cluster"):
        splits = max(size for size in (1, *gpu_cluster.SIZES) if size <= min(splits, CLUSTERED))
        if given.get("splits", 1) not in (1, *gpu_cluster.SIZES):
            raise ValueError(f"blocks={given}: a cluster of {given['splits']} splits, must be 1, 2, 4, 8 or 16")
    return {"slots": slots, "stages": stages, "splits": splits, "overlap": 1, "cluster": 0} | given


def _slots(width: int, warps: bool, groups: Groups | None) -> int:
    """Return the slots of a block where nothing is said of them."""
    if groups is None:
        return 128 if warps else 64
    # Of groups of 32 one is each warp's; of larger ones a warp should have all, which multiply its queries once.
    return max(groups.size, 128 if groups.size == 32 or width > 128 else 256)


def _memory(
    width: int, columns: int, stored: Any, scales: Any, warps: bool, groups: Groups | None, slots: int
) -> tuple[int, int]:
    """Return the bytes of shared memory of a block but for its stages, at most, and those of a stage."""
    sent = columns * 8 * max(gpu_cluster.SIZES)
    stage = 2 * slots * (width * jnp.dtype(stored).itemsize + (4 if scales is not None else 0))
    if groups is not None:
        stage = groups.stage_bytes(slots, width, jnp.dtype(scales).itemsize)
    if warps and slots % 128 == 0:
        return RESERVED // 3 + columns * width * 4 + sent, stage
    widened = slots * width * 2 if scales is not None else 0
    return columns * (width * 6 + slots * 2) + widened + RESERVED + sent, stage


def _call(name: str, plan: Plan, source: Any, inputs: dict[str, Array], interpret: Any) -> dict[str, Array]:
    """Run the kernel and return `out` `[B * K, splits, rows, H]` and perhaps `lse`, maybe with rows of padding.

    What a cluster has merged has neither splits nor padding.
    """
    groups, padded = inputs["q"].shape[0], plan.tiles * plan.columns
    axes = {"grid": (groups * plan.tiles, plan.splits), "grid_names": ("rows", "splits")}
    lead, rows = (groups, plan.splits), (plan.rows if plan.exact else padded, padded)
    if plan.cluster is not None:
        axes = {"grid": axes["grid"][:1], "grid_names": ("rows",)}
        axes |= {"cluster": (plan.splits,), "cluster_names": ("splits",)}
        lead, rows = (groups,), (plan.rows, plan.rows)
    shapes = {"out": jax.ShapeDtypeStruct((*lead, rows[0], plan.H), plan.out_dtype)}
    if plan.with_lse:
        shapes["lse"] = jax.ShapeDtypeStruct((*lead, rows[1]), jnp.float32)
    names, memory = list(inputs), scratch(plan, source.copies_of(plan.slots))

    def run(*refs: Any) -> None:
        given, rest = refs[: len(names)], refs[len(names) :]
        found, held = rest[: len(shapes)], rest[len(shapes) :]
        refs = dict(zip(names, given, strict=True)) | dict(zip(shapes, found, strict=True))
        body = gpu_warp_body.body if plan.by_warps else gpu_body.body
        body(plan, source, refs, dict(zip(memory, held, strict=True)))

    call = compat.gpu_kernel(
        run,
        name=name,
        out_type=list(shapes.values()),
        **axes,
        scratch_types=list(memory.values()),
        interpret=interpret,
        auto_barriers=not plan.by_warps,
    )
    return dict(zip(shapes, call(*inputs.values()), strict=True))


def _tree_words(tree: Bool[Array, "..."], B: int, G: int, plan: Plan) -> Int[Array, "B X R"]:
    """Return for each query row which nodes it sees, 32 to a word, and after the words its depth."""
    T = plan.tokens
    tree = jnp.broadcast_to(tree, (B, T, T))
    bits = jnp.pad(tree, ((0, 0), (0, 0), (0, 32 * plan.tree_words - T))).reshape(B, T, plan.tree_words, 32)
    words = (bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)).sum(-1, dtype=jnp.uint32)
    words = jax.lax.bitcast_convert_type(words, jnp.int32)
    found = jnp.concatenate([words, tree.sum(-1, keepdims=True, dtype=jnp.int32) - 1], axis=-1).swapaxes(1, 2)
    return jnp.pad(jnp.tile(found, (1, 1, G)), ((0, 0), (0, 0), (0, plan.tiles * plan.columns - plan.rows)))
