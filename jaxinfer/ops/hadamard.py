"""Orthonormal Hadamard matrices of the sizes that models have, and the fast product with them.

A matrix of size m * 2^k is the Kronecker product of a base matrix of order m and the Walsh-Hadamard matrix of size
2^k. Bases are constructed, not stored: Paley's two families over finite fields, and Williamson's four circulants.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxinfer.errors import InputError

_FACTOR = 32  # the Walsh-Hadamard part is applied in factors of up to this size: small, and yet a matrix product


def hadamard_transform(x: Float[Array, "*B I"], transpose: bool = False) -> Float[Array, "*B I"]:
    """Return `x H`, or `x H^T`, over the last axis, where H is `hadamard(I)`, in O(I log I) for I = 2^k.

    Sums are float32, rounded once to x's dtype. H^T is the inverse.

    Raises:
        InputError: no Hadamard matrix of this size is known here.
    """
    sizes = _factors(x.shape[-1])
    y = x.reshape(*x.shape[:-1], *sizes).astype(jnp.float32)
    for i, size in enumerate(sizes):
        axis = x.ndim - 1 + i
        product = jax.lax.dot_general(  # the contracted axis comes out last
            y,
            jnp.asarray(hadamard(size)),
            (((axis,), (1 if transpose else 0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
        )
        y = jnp.moveaxis(product, -1, axis)
    return y.reshape(x.shape).astype(x.dtype)


@functools.cache
def hadamard(size: int) -> Float[np.ndarray, "I I"]:
    """Return the matrix H of entries +-1/sqrt(size) with `H^T H = 1`, as float32.

    Raises:
        InputError: no Hadamard matrix of this size is known here.
    """
    base, power = _base(size)
    return (np.kron(base, _walsh(power)) / math.sqrt(size)).astype(np.float32)


def has_hadamard(size: int) -> bool:
    """Return whether `hadamard(size)` exists."""
    try:
        _base(size)
    except InputError:
        return False
    return True


def _factors(size: int) -> tuple[int, ...]:
    """Return sizes whose product is `size`: the base, then powers of two of nearly one size."""
    base, power = _base(size)
    exponent = power.bit_length() - 1
    count = -(-exponent // (_FACTOR.bit_length() - 1))
    powers = [2 ** (exponent // count + (i < exponent % count)) for i in range(count)]
    return tuple(f for f in (base.shape[0], *powers) if f > 1) or (1,)


@functools.cache
def _base(size: int) -> tuple[Float[np.ndarray, "m m"], int]:
    """Return the smallest base matrix (of +-1) for a size, and the power of two that is left."""
    if size > 0:
        odd = size // (size & -size)
        for base in itertools.takewhile(lambda m: m <= size, (odd * 2**k for k in itertools.count())):
            for construct in (_trivial, _paley_skew, _paley_symmetric, _williamson):
                if (matrix := construct(base)) is not None:
                    return matrix, size // base
    raise InputError(f"size {size}: no Hadamard matrix of it is known here; leave the axis of this size unrotated")


def _walsh(size: int) -> Float[np.ndarray, "I I"]:
    matrix = np.ones((1, 1))
    while matrix.shape[0] < size:
        matrix = np.kron(matrix, [[1, 1], [1, -1]])
    return matrix


def _trivial(order: int) -> np.ndarray | None:
    return np.ones((1, 1)) if order == 1 else None


def _paley_skew(order: int) -> np.ndarray | None:
    """Paley's first family: q = order - 1 is a prime power, 3 modulo 4."""
    q = order - 1
    if q % 4 != 3 or (characters := _character_matrix(q)) is None:
        return None
    return np.eye(order) + np.block([[np.zeros((1, 1)), np.ones((1, q))], [-np.ones((q, 1)), characters]])


def _paley_symmetric(order: int) -> np.ndarray | None:
    """Paley's second family: q = order / 2 - 1 is a prime power, 1 modulo 4."""
    q = order // 2 - 1
    if order % 4 or q % 4 != 1 or (characters := _character_matrix(q)) is None:
        return None
    conference = np.block([[np.zeros((1, 1)), np.ones((1, q))], [np.ones((q, 1)), characters]])
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1), [[1, -1], [-1, -1]])


def _character_matrix(q: int) -> np.ndarray | None:
    """Return `[chi(a - b)]` over the field of q elements: 1 for squares, -1 for others, 0 at 0; None: no field."""
    if q < 3:
        return None
    p = next(d for d in itertools.count(2) if q % d == 0 or d * d > q)
    p = p if q % p == 0 else q
    degree = round(math.log(q, p))
    if p == 2 or p**degree != q:
        return None
    digits = np.array(list(itertools.product(range(p), repeat=degree)))  # an element: its polynomial, low degree last
    weights = p ** np.arange(degree)[::-1]
    for tail in itertools.product(range(p), repeat=degree):
        squares = set((_squares(digits, tail, p) @ weights).tolist())
        # x^2 = y^2 only at x = +-y: true of a field, and of no other ring of odd size, so the tail is irreducible.
        if len(squares) == (q + 1) // 2:
            chi = np.array([0 if i == 0 else 1 if i in squares else -1 for i in range(q)])
            return chi[((digits[:, None] - digits[None]) % p) @ weights]
    return None


def _squares(digits: np.ndarray, tail: tuple[int, ...], p: int) -> np.ndarray:
    """Return the square of every polynomial modulo p and modulo `x^degree + tail`."""
    count, degree = digits.shape
    product = np.zeros((count, 2 * degree - 1), np.int64)
    for i, j in itertools.product(range(degree), repeat=2):
        product[:, i + j] += digits[:, i] * digits[:, j]
    for i in range(degree - 1):  # clear the highest power, one at a time
        product[:, i + 1 : i + 1 + degree] -= product[:, i : i + 1] * np.array(tail)
        product %= p
    return product[:, degree - 1 :] % p


def _williamson(order: int) -> np.ndarray | None:
    """Williamson's array for order = 4t, t prime: symmetric circulants with A^2 + B^2 + C^2 + D^2 = 4t (1944).

    The first rows are searched among those that are constant on the cosets of a subgroup of even order, with at most
    7 cosets: few enough to try every pair of pairs.
    """
    t = order // 4
    if order % 4 or not 3 <= t < 256 or any(t % d == 0 for d in range(2, math.isqrt(t) + 1)):
        return None
    root = next(g for g in range(2, t + 1) if len({pow(g, i, t) for i in range(t - 1)}) == t - 1)
    for cosets in (n for n in range(1, 8) if (t - 1) % (2 * n) == 0):
        rows = np.ones((2**cosets, t))
        for row, signs in zip(rows, itertools.product((1, -1), repeat=cosets), strict=True):
            for power in range(t - 1):
                row[pow(root, power, t)] = signs[power % cosets]
        spectra = np.fft.fft(rows).real ** 2  # of a symmetric row the transform is real
        pairs = list(itertools.combinations_with_replacement(range(len(rows)), 2))
        sums = {tuple(np.round(spectra[i] + spectra[j], 4) + 0.0): (i, j) for i, j in pairs}
        for (i, j), rest in ((ij, tuple(np.round(order - np.array(s), 4) + 0.0)) for s, ij in sums.items()):
            if rest in sums:
                a, b, c, d = (np.stack([np.roll(rows[k], s) for s in range(t)]) for k in (i, j, *sums[rest]))
                return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])
    return None
