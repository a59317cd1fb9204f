"""Attention over a ring of recent tokens: by the kernel's reference it is XLA's, and which programs hold the kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gpu import CALL, lowered, struct

from jaxinfer.cache import packed_attention as packed
from jaxinfer.cache import recent_attention as recent
from jaxinfer.cache.kivi import Kivi
from jaxinfer.ops.token_tree import TokenTree
from pallas_kernels import chips, gpus

K, N, H = 2, 4, 16
OPTIONS = dict(scale=0.3, window=None, softcap=None)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("more", [{}, {"window": 20, "softcap": 4.0}, {"window": 6}], ids=str)
@pytest.mark.parametrize("page", [None, 16])
def test_by_the_kernels_reference_it_is_as_by_xla(more, page, monkeypatch):
    """In every step of rows that begin at nothing, and of some that come round; one is rewound, one is padding."""
    kind, B, steps = Kivi(group=8, residual=5, page=page), 4, 60
    k, v, q = draw(0, steps, B, 1, K, H), draw(1, steps, B, 1, K, H), draw(2, steps, B, 1, N, H)
    monkeypatch.setattr(recent.targets, "kernel", lambda of: of.reference)
    outputs = {}
    for which in ("pallas", "xla"):
        for module in (packed, recent):  # where a row sees nothing, the kernels' log-sum-exp is -inf
            choose = {"pallas": lambda _, pallas, xla, *x: pallas(*x), "xla": lambda _, pallas, xla, *x: xla(*x)}
            monkeypatch.setattr(module, "choose", choose[which])
        layer, out = kind.create(B, 300, K, H, jnp.float32), []
        layer = layer.append(draw(3, B, 90, K, H), draw(4, B, 90, K, H), jnp.zeros(B, int), jnp.asarray([0, 3, 90, 41]))
        length = np.array([0, 3, 90, 41])

        @jax.jit
        def step(layer, q, k, v, length, counts):
            positions = jnp.where(counts > 0, length, -1)[:, None]
            return layer.append(k, v, length, counts).attend(q, positions, **OPTIONS | more)

        for i in range(steps):
            counts = np.array([1, 1, 1, i % 3 > 0])
            found, layer = step(layer, q[i], k[i], v[i], length, counts)
            assert np.isfinite(found).all()
            out.append(np.where(counts[:, None, None, None] > 0, found, 0))
            length = length + counts
            if i == 40:
                length = np.array([length[0], length[1], length[2] - 20, length[3]])
                layer = layer.rewind(jnp.asarray(length))
        assert layer.recent.size < 60
        outputs[which] = np.stack(out)
    assert np.abs(outputs["xla"]).max() > 0.1
    np.testing.assert_allclose(outputs["pallas"], outputs["xla"], rtol=0, atol=2e-6)


def _operands(T=1, dtype=jnp.bfloat16, **options):
    layer = jax.eval_shape(lambda: Kivi(**options).create(2, 1024, 2, 128, dtype))
    return layer, struct(2, T, 8, 128, dtype=dtype), struct(2, T, dtype=jnp.int32)


def _attend(layer, q, positions):
    return layer.attend(q, positions, **OPTIONS)[0]


@pytest.mark.parametrize("options", [{}, {"page": 64}, {"group": 64, "residual": 128}], ids=str)
def test_a_step_of_one_token_is_two_kernels(options):
    assert lowered(_attend, *_operands(**options)).count("custom_call @mosaic_gpu") == 2
    assert lowered(_attend, *_operands(4, **options)).count("custom_call @mosaic_gpu") == 1  # the ring is XLA's
    assert CALL not in lowered(_attend, *_operands(dtype=jnp.float32, **options))


def test_what_it_refuses():
    def attend(layer, q, positions, tree=None):
        old = jnp.zeros(q.shape, jnp.float32), jnp.zeros(q.shape[:3], jnp.float32)
        options = dict(group=32, residual=64, tree=tree, implementation="pallas")
        return recent.recent_attention(q, layer.recent, positions, old, **OPTIONS | options)

    with gpus.assume("h100"):
        jax.eval_shape(attend, *_operands())
        with pytest.raises(NotImplementedError, match="2 queries: must be one"):
            jax.eval_shape(attend, *_operands(2))
        tree = TokenTree(depth=np.zeros(1, int), ancestors=np.ones((1, 1), bool))
        with pytest.raises(NotImplementedError, match="must be one"):
            jax.eval_shape(functools.partial(attend, tree=tree), *_operands())
    with chips.assume("v5e"), pytest.raises(NotImplementedError, match="ring: must be a cache of all slots"):
        jax.eval_shape(attend, *_operands())
