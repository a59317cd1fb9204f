"""Quantized product on TPU: blocks of whole output rows stream through VMEM while x stays, in the form the MXU takes.

The weight is pushed into the MXU as it lies. Four-bit codes become int8 by a mask on words of four bytes, low and high
nibbles apart, and it is x that is brought into their order, once. Inputs of several groups meet in one push: x has then
one row for each group, zero outside it, so that each group's sum comes out apart and is scaled in float32.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels import calls, chips, tuning
from pallas_kernels.codes import widen
from pallas_kernels.quantized_matmul.reference import FOUR_BIT, QTYPES
from pallas_kernels.quantized_matmul.tpu_plan import HALF, Refs, cut, each_turn, fitting, layout, operands

RUN = 32  # inputs that share 16 bytes
REGISTERS = 8  # of the 64, for the sums of the outputs that are computed together
PREPARED = 64  # registers of parts of x that are prepared together
SIGNED = np.int32(0xF0F0F0F0 - (1 << 32))  # in the high half of a byte a nibble has the byte's sign
UNSIGNED = np.int32(0x0F0F0F0F)
INT32_INPUTS = 1024  # of a group, up to which sums of two parts of x fit an int32 together: 127.5 * 128 * 128 each


def quantized_matmul(
    x: Float[Array, "M I"],
    values: Array,
    scale: Float[Array, "G O"],
    *,
    qtype: str,
    offset: Float[Array, "G O"] | None = None,
    activations: str | None = None,
    blocks: dict[str, int] | None = None,
    interpret: calls.Interpret = False,
) -> Float[Array, "M O"]:
    """Return what the contract of this folder says.

    `blocks`: rows of x a block, outputs a copy, copies a step, bytes of an output that meet in a push (`lanes`); by
    default those tuned for the chip, or smaller ones that fit into its VMEM.

    Raises:
        NotImplementedError: a qtype, or groups, that the kernel does not know; outputs too wide for any blocks.
        ValueError: shapes that do not fit, or blocks that need too much VMEM.
    """
    chip = chips.current()
    _check(x, values, scale, offset, qtype, activations)
    if blocks is None:
        shape = shape_class(x, values, scale, qtype=qtype, activations=activations)
        tuned = tuning.blocks("quantized_matmul", chip.name, shape)
        plan = fitting(x, values, scale, offset, qtype, activations, tuned, chip)
    else:
        plan = cut(x, values, scale, qtype, activations, blocks, chip)
    return _run(x, values, scale, offset, plan=plan, chip=chip, interpret=interpret)


@functools.partial(jax.jit, static_argnames=("plan", "chip", "interpret"))
def _run(x, values, scale, offset, *, plan, chip, interpret):
    """Return the product. A program with many of one shape, as those of layers are, traces and lowers the body once."""
    if plan.width != x.shape[1]:
        x = jnp.pad(x, ((0, 0), (0, plan.width - x.shape[1])))
    run = calls.call(
        functools.partial(_body, plan=plan, offset=offset is not None),
        name="quantized_matmul",
        **layout(plan, x, values, offset, chip),
        scalars=(),
        semantics=("parallel", "arbitrary", "arbitrary"),
        interpret=interpret,
    )
    return run(*operands(plan, x, values, scale, offset))


def shape_class(
    x: Any, values: Any, scale: Any, *, qtype: str, activations: str | None = None, **_
) -> dict[str, int | str]:
    """Return the key of the tuned table: the form, inputs a group, rows, inputs and outputs."""
    form = f"{qtype}_{activations or jnp.dtype(x.dtype).name}"
    M, I = x.shape
    return {"form": form, "group": I // scale.shape[0], "M": M, "I": I, "O": values.shape[0]}


def _check(x, values, scale, offset, qtype, activations) -> None:
    """Raise for what the contract does not allow, or the kernel does not know."""
    if qtype not in QTYPES:
        raise NotImplementedError(f"qtype={qtype!r}: must be one of {', '.join(QTYPES)}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"x of {x.dtype}: must be float32 or bfloat16")
    if activations not in (None, "int8"):
        raise NotImplementedError(f"activations={activations!r}: must be None or 'int8'")
    if activations == "int8" and qtype == "float8_e4m3fn":
        raise NotImplementedError("activations='int8' with a float8_e4m3fn weight: no chip multiplies the two")
    O, G, I = values.shape[0], scale.shape[0], x.shape[1]
    held = values.shape[1] * (2 if qtype in FOUR_BIT else 1)
    if held != I:
        raise ValueError(f"values {values.shape} of {qtype}: hold {held} inputs an output, and x has {I}")
    stored = {"int8": (jnp.int8,), "float8_e4m3fn": (jnp.float8_e4m3fn, jnp.uint8)}.get(qtype, (jnp.uint8,))
    if values.dtype not in stored:
        raise ValueError(
            f"values of {values.dtype}: those of {qtype} are {' or '.join(jnp.dtype(d).name for d in stored)}"
        )
    if scale.shape != (G, O) or I % G or (offset is not None and offset.shape != scale.shape):
        raise ValueError(f"scale {scale.shape}: must be [G, {O}], where G divides {I}, and offset like it")
    if qtype in FOUR_BIT and (I // G) % RUN:
        raise NotImplementedError(f"groups of {I // G} inputs of {qtype}: must be multiples of {RUN}")


def _body(x_ref, scale_ref, *refs, plan, offset):
    refs, copies, outputs = list(refs), plan.copies, plan.outputs
    offset_ref = refs.pop(0) if offset else None
    weights, (out_ref, parts_ref, step_ref, sum_ref) = refs[:copies], refs[copies:]
    step_ref, sum_ref = step_ref if plan.rounded else None, sum_ref if offset else None
    refs = Refs(x_ref, weights, scale_ref, offset_ref, parts_ref, step_ref, sum_ref)

    @pl.when(pl.program_id(2) == 0)
    def _():
        each_turn(lambda refs, plan, _: _prepare(refs.x, refs.parts, refs.step, refs.sum, plan), refs, plan, None)

    # Every stage for some outputs at once, as many as leave registers for their sums.
    together = max(1, REGISTERS // (plan.rows * outputs // 1024))
    which = [range(first, min(first + together, copies)) for first in range(0, copies, together)]

    def add(refs, plan, totals):
        return [_block(refs, each, total, plan) for each, total in zip(which, totals, strict=True)]

    totals = [[jnp.zeros((plan.rows, outputs), jnp.float32) for _ in each] for each in which]
    for each, total in zip(which, each_turn(add, refs, plan, totals), strict=True):
        for c, y in zip(each, total, strict=True):
            out_ref[:, c * outputs : (c + 1) * outputs] = y.astype(out_ref.dtype)


def _block(refs, which, total, plan):
    """Return `total` and the sums for the outputs of a few copies, float32; `which` are their numbers in the step."""
    parts_ref, step_ref, sum_ref, scale_ref, offset_ref = refs.parts, refs.step, refs.sum, refs.scale, refs.offset
    weights = [refs.weights[c] for c in which]
    outputs = weights[0].shape[0]

    def columns(ref, g):
        return [ref[g : g + 1, c * outputs : (c + 1) * outputs].astype(jnp.float32) for c in which]

    def add(total, sums, factors):
        return [t + y * f for t, y, f in zip(total, sums, factors, strict=True)]

    ones = [1.0] * len(total)
    for chunk in range(plan.chunks):
        width = min(plan.lanes, plan.bytes - chunk * plan.lanes)
        found = [_product(parts_ref, weight, chunk, width, plan) for weight in weights]
        for j in range(plan.groups):
            at = chunk * plan.groups + j  # of x's steps and sums
            if plan.grouped and at >= plan.scales:
                break
            sums = [_join(y, j, plan) for y in found]
            if plan.rounded:
                step = _across(step_ref[at], outputs)
                sums = [y * step for y in sums]
            total = add(total, sums, columns(scale_ref, at) if plan.grouped else ones)
            if offset_ref is not None and plan.grouped:
                total = add(total, [_across(sum_ref[at], outputs)] * len(total), columns(offset_ref, at))
    if not plan.grouped:
        total = [y * scale for y, scale in zip(total, columns(scale_ref, 0), strict=True)]
        if offset_ref is not None:
            of_x = functools.reduce(jnp.add, [sum_ref[i] for i in range(plan.chunks)])
            total = add(total, [_across(of_x, outputs)] * len(total), columns(offset_ref, 0))
    return total


def _product(parts_ref, weight_ref, chunk, width, plan):
    """Return the sums of a chunk, [parts x groups x rows, outputs]."""
    found = None
    start = chunk * plan.lanes
    if plan.lanes == HALF and start - start % 128 + 128 <= plan.bytes:
        return _dot(parts_ref[chunk], _folded(weight_ref, start, plan))
    planes = _codes(weight_ref, start, width, plan)
    if plan.planes == 2 and width == plan.lanes and width % 128 == 0:
        return _dot(parts_ref[chunk], jnp.concatenate(planes, axis=1))
    for i, codes in enumerate(planes):
        y = _dot(parts_ref[chunk, :, i * plan.lanes : i * plan.lanes + width], codes)
        found = y if found is None else found + y
    return found


def _folded(weight_ref, start, plan):
    """Return the codes of 64 bytes, the low nibbles in the first lanes and the high ones in the others."""
    aligned = start - start % 128
    words = pltpu.bitcast(weight_ref[:, aligned : aligned + 128], jnp.int32)
    other = pltpu.roll(words, HALF, 1)
    low, high = (words, other) if start % 128 == 0 else (other, words)
    first = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1) < HALF
    if plan.qtype == "int4":
        nibbles = jnp.where(first, low << 4, high) & SIGNED
    else:
        nibbles = jnp.where(first, low, high >> 4) & UNSIGNED
    return widen(pltpu.bitcast(nibbles, jnp.int8), plan.dtype)


def _codes(weight_ref, start, width, plan):
    """Return each plane of the codes of a chunk, [outputs, width]; those of int4 are 16 times as large (`enlarged`)."""
    at = slice(start, start + width)
    if plan.planes == 1:
        return [widen(weight_ref[:, at], plan.dtype)]
    words = pltpu.bitcast(weight_ref[:, at], jnp.int32)  # of four outputs
    if plan.qtype == "int4":
        planes = (words << 4) & SIGNED, words & SIGNED
    else:
        planes = words & UNSIGNED, (words >> 4) & UNSIGNED
    return [widen(pltpu.bitcast(plane, jnp.int8), plan.dtype) for plane in planes]


def _join(found, j, plan):
    """Return the sums of group j of a chunk, float32, of all parts of x."""
    rows = plan.rows
    parts = [found[(p * plan.groups + j) * rows :][:rows] for p in range(plan.parts)]
    if not plan.integer:
        return functools.reduce(jnp.add, parts[::-1])
    if len(parts) == 2 and plan.group <= INT32_INPUTS:
        return ((parts[0] << 7) + parts[1]).astype(jnp.float32)
    parts = [part.astype(jnp.float32) for part in parts]
    return functools.reduce(lambda high, low: high * 128.0 + low, parts)


def _prepare(x_ref, parts_ref, step_ref, sum_ref, plan):
    """Write x as the MXU takes it: parts, one row for each group, in the order of the codes; and its steps and sums."""
    order = _order(min(plan.lanes, 128)) if plan.planes == 2 else None
    together = max(1, 1024 * PREPARED // (plan.rows * plan.inputs * plan.parts))
    for first in range(0, plan.chunks, together):
        chunks = range(first, min(first + together, plan.chunks))
        _prepare_chunks(chunks, order, x_ref, parts_ref, step_ref, sum_ref, plan)


def _prepare_chunks(chunks, order, x_ref, parts_ref, step_ref, sum_ref, plan):
    """Write what belongs to a few chunks, each stage for all of them at once: the stages of one are long waits."""
    W, rows, groups = plan.inputs, plan.rows, range(plan.groups)
    x = [x_ref[:, chunk * W : (chunk + 1) * W].astype(jnp.float32) for chunk in chunks]
    steps = [[1.0] * plan.groups for _ in chunks]
    if plan.rounded:
        apart = [_each_group(jnp.abs(y), plan) for y in x]
        peaks = [[y.max(axis=1, keepdims=True) for y in parts] for parts in apart]
        steps = [[_step(y, plan) for y in parts] for parts in peaks]
        if plan.parts == 1:  # the step is the contract's: divided by as the reference divides
            x = [jnp.round(y / _spread(step, plan)) for y, step in zip(x, steps, strict=True)]
        else:
            inverse = [[1.0 / s for s in step] for step in steps]
            x = [jnp.round(y * _spread(step, plan)) for y, step in zip(x, inverse, strict=True)]
        for chunk, step in zip(chunks, steps, strict=True):
            for j in groups:
                step_ref[chunk * plan.groups + j] = jnp.broadcast_to(step[j] / plan.enlarged, (rows, 128))
    if sum_ref is not None:
        sums = [[y.sum(axis=1, keepdims=True) for y in _each_group(y, plan)] for y in x]
        for chunk, total, step in zip(chunks, sums, steps, strict=True):
            for j in groups:
                sum_ref[chunk * plan.groups + j] = jnp.broadcast_to(total[j] * step[j], (rows, 128))
    split = [_digits(y, plan.parts) if plan.rounded else _truncated(y / plan.enlarged, plan.parts) for y in x]
    split = [jnp.concatenate(parts) for parts in split]
    if order is not None:
        split = _ordered(split, order)
    if plan.integer:
        split = [y.astype(jnp.int32) for y in split]
    short = plan.lines - plan.parts * plan.groups * rows
    for chunk, y in zip(chunks, split, strict=True):
        parts = [y[p * rows : (p + 1) * rows] for p in range(plan.parts)]
        if plan.groups > 1:
            size = plan.lanes // plan.groups
            lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
            lane = lane - jnp.where(lane >= plan.lanes, plan.lanes, 0)
            own = [(lane >= j * size) & (lane < (j + 1) * size) for j in groups]
            parts = [jnp.where(own[j], part, jnp.zeros_like(part)) for part in parts for j in groups]
        if short:
            parts.append(jnp.zeros((short, W), y.dtype))
        parts_ref[chunk] = jnp.concatenate(parts).astype(plan.dtype)


def _each_group(x, plan):
    """Return the inputs of each group of a chunk, apart or with zeros in place of the others."""
    if plan.group % 128 == 0:
        return [x[:, j * plan.group : (j + 1) * plan.group] for j in range(plan.groups)]
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, plan.inputs), 1)
    return [
        jnp.where((lane >= j * plan.group) & (lane < (j + 1) * plan.group), x, 0.0) for j in range(plan.groups)
    ]  # fmt: skip


def _spread(steps, plan):
    """Return the step of each input of a chunk."""
    shape = (plan.rows, plan.inputs)
    if plan.groups == 1:
        return jnp.broadcast_to(steps[0], shape)
    if plan.group % 128 == 0:
        return jnp.concatenate([jnp.broadcast_to(s, (plan.rows, plan.group)) for s in steps], axis=1)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    found = jnp.broadcast_to(steps[-1], shape)
    for j in range(plan.groups - 2, -1, -1):
        found = jnp.where(lane < (j + 1) * plan.group, steps[j], found)
    return found


def _step(peak, plan):
    return jnp.where(peak > 0, peak / (127.0 * 128.0 ** (plan.parts - 1)), 1.0)


def _digits(x, parts):
    """Return integers as digits of base 128, the first up to 127 and the others -64..64, largest first."""
    found = []
    for p in range(parts - 1, -1, -1):
        digit = jnp.round(x * 128.0**-p) if p else x
        found.append(digit)
        x = x - digit * 128.0**p if p else x
    return found


def _truncated(x, parts):
    """Return numbers of 8 bits each that add up to x exactly, largest first; x itself if it is one."""
    if parts == 1:
        return [x]
    found = []
    for _ in range(parts):
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-65536)
        found.append(jax.lax.bitcast_convert_type(bits, jnp.float32))
        x = x - found[-1]
    return found


def _order(half):
    """Return the matrix that brings inputs into the order of the low nibbles, then the high ones, of `half` bytes."""
    source = jax.lax.broadcasted_iota(jnp.int32, (2 * half, 2 * half), 0)
    target = jax.lax.broadcasted_iota(jnp.int32, (2 * half, 2 * half), 1)
    byte, high = target & (half - 1), (target >= half).astype(jnp.int32)
    wanted = ((byte >> 4) << 5) + (byte & 15) + (high << 4)
    return (source == wanted).astype(jnp.float32).astype(jnp.bfloat16)


def _ordered(numbers, order):
    """Return each array of numbers of 8 bits in the order of the codes: all low nibbles of a chunk, then all high ones.

    One product for all of them: the matrix is pushed once.
    """
    wide, rows = order.shape[0], numbers[0].shape[0]
    pieces = [x[:, i : i + wide] for x in numbers for i in range(0, x.shape[1], wide)]
    dots = (((1,), (0,)), ((), ()))
    found = jax.lax.dot_general(
        jnp.concatenate(pieces).astype(jnp.bfloat16), order, dots, preferred_element_type=jnp.float32
    )
    pieces = [found[i : i + rows] for i in range(0, found.shape[0], rows)]
    each = len(pieces) // len(numbers)
    if each == 1:
        return pieces
    pieces = [pieces[i : i + each] for i in range(0, len(pieces), each)]
    halves = [[y[:, : wide // 2] for y in own] + [y[:, wide // 2 :] for y in own] for own in pieces]
    return [jnp.concatenate(own, axis=1) for own in halves]


def _across(x, outputs):
    """Return [rows, 128] equal lanes as [rows, outputs]."""
    return jnp.concatenate([x] * (outputs // 128), axis=1)


def _dot(a, b):
    kind = jnp.int32 if a.dtype == jnp.int8 else jnp.float32
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=kind)
