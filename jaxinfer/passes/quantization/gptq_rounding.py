"""GPTQ's rounding of one matrix: column by column, each error pushed onto the columns that are still to come."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def gptq_codes(
    w: Float[Array, "O I"],
    hessian: Float[Array, "I I"],
    scale: Float[Array, "O G"],
    offset: Float[Array, "O G"] | None,
    levels: tuple[int, int],
    *,
    damp: float = 0.01,
    act_order: bool = True,
    block: int = 128,
) -> Int[Array, "O I"]:
    """Return codes in `levels` (lowest, highest) that nearly minimise `tr(D H D^T)`, `D = w - (codes*scale + offset)`.

    With `H^-1 = U^T U`, U upper triangular, column j is rounded and `e_j = (w_j - q_j) / U_jj` is taken from the later
    ones, `w_k -= e_j U_jk`; the loss is then the sum of all e_j^2 (at `damp` 0), and at most `sum_j (scale/2 / U_jj)^2`
    a row where nothing clips.

    The grid (`scale`, `offset`; group g is columns g*I/G ..) is that of the weights as given, so `act_order` (columns
    of large H_jj first, while many others can still make up for them) leaves the storage in order. `damp` is added to
    the diagonal in units of its mean. Columns that calibration never saw (H_jj = 0) are rounded to nearest. `block`
    columns are finished before their errors go to the rest: it changes speed only. (2210.17323)
    """
    O, I = w.shape
    block = min(block, I)
    diagonal = jnp.diag(hessian)
    order = jnp.argsort(-diagonal, stable=True) if act_order else jnp.arange(I)
    padded = -(-I // block) * block
    columns = lambda a: jnp.pad(a.T[order], ((0, padded - I), (0, 0)), constant_values=1)  # noqa: E731
    spread = lambda a: columns(jnp.repeat(a.astype(jnp.float32), I // a.shape[1], axis=1))  # noqa: E731
    scales, offsets = spread(scale), None if offset is None else spread(offset)
    upper = _inverse_factor(hessian[order][:, order], damp)
    upper = jnp.pad(upper, (0, padded - I)) + jnp.diag(jnp.arange(padded) >= I).astype(jnp.float32)

    def round_block(w: Array, start: Array) -> tuple[Array, Array]:
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, block)  # noqa: E731
        rows = cut(upper)
        corner = jax.lax.dynamic_slice_in_dim(rows, start, block, axis=1)
        s, z = cut(scales), None if offsets is None else cut(offsets)

        def round_column(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            now, codes, errors = state
            shift = 0.0 if z is None else z[j]
            code = jnp.clip(jnp.round((now[j] - shift) / s[j]), *levels)
            error = (now[j] - (code * s[j] + shift)) / corner[j, j]
            return now - corner[j][:, None] * error, codes.at[j].set(code.astype(jnp.int8)), errors.at[j].set(error)

        state = (cut(w), jnp.zeros((block, O), jnp.int8), jnp.zeros((block, O), jnp.float32))
        _, codes, errors = jax.lax.fori_loop(0, block, round_column, state)
        return w - rows.T @ errors, codes  # rows of `upper` are zero left of the block: what is done stays done

    _, codes = jax.lax.scan(round_block, columns(w.astype(jnp.float32)), jnp.arange(0, padded, block))
    return jnp.zeros((I, O), jnp.int8).at[order].set(codes.reshape(padded, O)[:I]).T


def _inverse_factor(hessian: Float[Array, "I I"], damp: float) -> Float[Array, "I I"]:
    """Return the upper triangular U with `U^T U` the inverse of the damped Hessian, without forming that inverse.

    A Cholesky factor taken from the last column backwards, H = R R^T with R upper triangular, has U = R^-1.
    """
    diagonal = jnp.diag(hessian).astype(jnp.float32)
    extra = jnp.where(diagonal == 0, 1.0, 0.0) + damp * jnp.mean(diagonal)
    h = hessian.astype(jnp.float32) + jnp.diag(extra)
    r = jnp.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    return jax.scipy.linalg.solve_triangular(r, jnp.eye(len(h), dtype=jnp.float32), lower=False)
