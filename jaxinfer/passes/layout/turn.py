"""The two orders of a linear layer's kernel, [in, out] and [out, in], and the way between them."""

import jax

from jaxinfer.models.layers import Linear
from jaxinfer.tree import replace


def letters(linear: Linear) -> tuple[str, str]:
    """Return the letters of the contracted and of the produced kernel axes."""
    left, out = linear.eq.split("->")
    return left.split(",")[0][2:], out[2:]


def turn(linear: Linear, inputs_first: bool) -> Linear:
    """Return the same map with its kernel stored in the given order; abstract kernels work too."""
    inner, outer = letters(linear)
    x, kernel = linear.eq.split("->")[0].split(",")
    wanted = inner + outer if inputs_first else outer + inner
    if kernel == wanted:
        return linear
    order = tuple(kernel.index(c) for c in wanted)
    transpose = lambda k: k.transpose(order)  # noqa: E731 - a view where the kernel is in host memory
    leaf = linear.kernel
    new = jax.eval_shape(transpose, leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else transpose(leaf)
    eq = linear.eq.replace(f"{x},{kernel}", f"{x},{wanted}")
    return replace(linear, kernel=new, eq=eq, axes=tuple(linear.axes[i] for i in order))
