"""Products with quantized weights in machine code for CPUs, for which XLA has no good code at one row.

The kernels are compiled in this process by llvmlite for the host's vectors (AVX-512 VNNI, AVX2, or NEON with dot
products), each on the first trace that uses it, and called by XLA inside its programs. The weight is read once for all
rows of x, by every thread of XLA's pool. `available` says whether this works here; if not, use what XLA has.
"""

import functools
import importlib.util
import threading

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Int8, Int32, UInt8

_RUN = 32  # entries of a row whose 4-bit values share 16 bytes: low nibbles the first half, high ones the second
_KINDS = {"float32": "float", "float16": "half"}
_ABSENT = "no CPU kernels here: they need XLA's CPU backend, llvmlite and AVX2, AVX-512 VNNI or NEON"
_lock = threading.Lock()
_registered: dict[str, object] = {}  # name -> machine code, which XLA may call as long as the process lives


@functools.cache
def available() -> bool:
    """Return whether the kernels can run: XLA's CPU backend, llvmlite, and vectors of bytes. Never raises."""
    try:
        if jax.default_backend() != "cpu" or importlib.util.find_spec("llvmlite") is None:
            return False
        _register("int8_dot")
    except Exception:  # a processor, an llvmlite or an XLA that is not as expected: there are no kernels, no more
        return False
    return True


def int8_dot(x: Int8[Array, "M I"], w: Int8[Array, "O I"]) -> Int32[Array, "M O"]:
    """Return `x w^T`, exactly: the sums are int32, which no I below 131072 overflows.

    Raises:
        ValueError: the kernels are not available, or the shapes don't fit.
    """
    _check(x, w, w.shape[1])
    return _call("int8_dot", jnp.int32, x, w)


def int8_matmul(
    x: Float[Array, "M I"], w: Int8[Array, "O I"], scale: Float[Array, "O"], group: int | None = None
) -> Float[Array, "M O"]:
    """Return `round(x / s) w^T * s * scale`: each row of x is rounded to int8, s its largest magnitude over 127.

    With `group`, a multiple of 16, each group of a row has an s of its own.

    Raises:
        ValueError: the kernels are not available, the shapes don't fit, or x or scale is not float32.
    """
    _check(x, w, w.shape[1], scale)
    if scale.shape != w.shape[:1] or scale.dtype != jnp.float32:
        raise ValueError(f"scale {_show(scale)}: must be float32 {w.shape[:1]}, one for each row of the weight")
    if group is not None and (group < 16 or group % 16 or w.shape[1] % group):
        raise ValueError(f"group={group}: must be a multiple of 16 that divides {w.shape[1]}")
    whole = group in (None, w.shape[1])
    return _call("int8_matmul" if whole else f"int8_groups:{group}", jnp.float32, x, w, scale.reshape(-1, 1))


def weight_only(
    x: Float[Array, "M I"],
    values: Int8[Array, "O I"] | UInt8[Array, "O J"],
    scale: Float[Array, "O G"],
    offset: Float[Array, "O G"] | None = None,
    *,
    qtype: str,
) -> Float[Array, "M O"]:
    """Return `x w^T` with `w = codes * scale + offset` and x as it is: float32 products and sums.

    `qtype` is "int8", or "int4" (-8..7) or "uint4" (0..15) for two values a byte, packed in runs of 32 entries.

    Raises:
        ValueError: the kernels are not available, or shapes, groups or dtypes that they can't take.
    """
    _check_grouped(x, values, scale, offset, qtype, ("int8", "int4", "uint4"))
    name = f"weight_only:{qtype}:{_KINDS[scale.dtype.name]}:{'plain' if offset is None else 'offset'}"
    return _call(name, jnp.float32, x, values, scale, *([] if offset is None else [offset]))


def q4_matmul(
    x: Float[Array, "M I"],
    values: UInt8[Array, "O J"],
    scale: Float[Array, "O G"],
    offset: Float[Array, "O G"] | None = None,
    *,
    qtype: str,
) -> Float[Array, "M O"]:
    """Return `round(x / s) s w^T` with `w = codes * scale + offset`: x is rounded to int8 in groups of 32 entries.

    Sums of 32 products are exact integers. It is a product of 8-bit activations: faster than `weight_only`, and not
    the same numbers.

    Raises:
        ValueError: the kernels are not available, or shapes, groups or dtypes that they can't take.
    """
    _check_grouped(x, values, scale, offset, qtype, ("int4", "uint4"))
    runs = x.shape[1] // scale.shape[1] // _RUN
    if runs > 2 and runs % 4:
        raise ValueError(f"groups of {runs * _RUN} entries: must be 32, 64, or a multiple of 128")
    name = f"q4:{qtype}:{_KINDS[scale.dtype.name]}:{'plain' if offset is None else 'offset'}:{min(runs, 4)}"
    return _call(name, jnp.float32, x, values, scale, *([] if offset is None else [offset]))


def attention(
    q: Float[Array, "M R H"],
    bounds: Int32[Array, "M R 2"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    parts: int,
) -> Float[Array, "M R H"]:
    """Return `softmax(q k^T) v` of the queries of each head m, M = B * K.

    Query r sees the slots bounds[m, r, 0] .. bounds[m, r, 1] - 1; what others hold is never used, and of none the
    result is 0. What a head's queries see is cut into `parts`, which threads share. Each kernel is made for its H, a
    multiple of 16, and its parts.

    Raises:
        ValueError: the kernels are not available, or the shapes or dtypes don't fit.
    """
    if not available():
        raise ValueError(_ABSENT)
    M, R, H = q.shape
    shapes = (k.shape[0] * k.shape[1], k.shape[3], v.shape, bounds.shape)
    if H % 16 or shapes != (M, H, k.shape, (M, R, 2)) or 0 in (*q.shape, *k.shape):
        raise ValueError(f"q {_show(q)}, bounds {_show(bounds)}, k {_show(k)}, v {_show(v)}: don't fit; H must be 16 n")
    if any(x.dtype != jnp.float32 for x in (q, k, v)):
        raise ValueError(f"q {_show(q)}, k {_show(k)}, v {_show(v)}: must be float32")
    # XLA would write a cache twice that it is to hand on in two shapes: k and v come as they are.
    result = jax.ShapeDtypeStruct((M, R, H), jnp.float32)
    return jax.ffi.ffi_call(_register(f"attention:{H}:{parts}"), result, vmap_method="sequential")(q, bounds, k, v)


def _check_grouped(x, values, scale, offset, qtype, qtypes) -> None:
    if qtype not in qtypes:
        raise ValueError(f"qtype={qtype!r}: must be one of {', '.join(qtypes)}")
    inner = values.shape[1] * (1 if qtype == "int8" else 2)
    _check(x, values, inner, scale)
    if values.dtype != (jnp.int8 if qtype == "int8" else jnp.uint8):
        raise ValueError(f"values {_show(values)}: {qtype} is stored as {'int8' if qtype == 'int8' else 'uint8'}")
    if scale.shape[0] != values.shape[0] or not scale.shape[1] or inner % scale.shape[1]:
        raise ValueError(f"scale {_show(scale)}: must be [{values.shape[0]}, a divisor of {inner}]")
    if qtype != "int8" and inner // scale.shape[1] % _RUN:
        raise ValueError(f"groups of {inner // scale.shape[1]} entries: 4-bit values need a multiple of {_RUN}")
    if scale.dtype.name not in _KINDS:
        raise ValueError(f"scale {_show(scale)}: must be {' or '.join(_KINDS)}")
    if offset is not None and (offset.shape, offset.dtype) != (scale.shape, scale.dtype):
        raise ValueError(f"offset {_show(offset)}: must be like scale, {_show(scale)}")


def _check(x: Array, w: Array, inner: int, *scaled: Array) -> None:
    if not available():
        raise ValueError(_ABSENT)
    if x.ndim != 2 or x.shape[1] != inner:
        raise ValueError(f"x {_show(x)}: must be rows of {inner} for a weight {_show(w)}")
    if 0 in (*x.shape, *w.shape):
        raise ValueError(f"x {_show(x)} and weight {_show(w)}: must not be empty")
    if scaled and x.dtype != jnp.float32:
        raise ValueError(f"x {_show(x)}: must be float32")


def _show(array: Array) -> str:
    return f"{array.dtype.name}{list(array.shape)}"


def _call(name: str, dtype: DTypeLike, x: Array, w: Array, *rest: Array) -> Array:
    result = jax.ShapeDtypeStruct((x.shape[0], w.shape[0]), dtype)
    return jax.ffi.ffi_call(_register(name), result)(x, w, *rest)


def _register(name: str) -> str:
    """Compile a kernel and tell XLA of it, once; return the name under which XLA knows it."""
    from jaxinfer.ops import cpu_kernels_call as call

    isa = call.instruction_set()
    if isa is None:
        raise NotImplementedError("no kernels for this processor's vectors")
    target = f"jaxinfer:{isa}:{name}"
    with _lock:
        if target not in _registered:
            address, code = call.compile_kernel(_kernel(name, isa))
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(address), platform="cpu")
            _registered[target] = code
    return target


def _kernel(name: str, isa: str):
    """Return the kernel that a name such as "q4:int4:half:plain:2" stands for."""
    from jaxinfer.ops import cpu_kernels_rows as rows
    from jaxinfer.ops.cpu_kernels_attention import attention_kernel
    from jaxinfer.ops.cpu_kernels_groups import int8_groups_kernel

    kind, *options = name.split(":")
    if kind == "attention":
        return attention_kernel(*map(int, options))
    if kind in ("int8_dot", "int8_matmul"):
        return rows.int8_kernel(isa, floats=kind == "int8_matmul")
    if kind == "int8_groups":
        return int8_groups_kernel(isa, int(options[0]))
    qtype, scale, offset, *runs = options
    if kind == "weight_only":
        return rows.weight_only_kernel(qtype, isa, scale=scale, offset=offset == "offset")
    return rows.q4_kernel(qtype, isa, scale=scale, offset=offset == "offset", runs=int(runs[0]))
