"""The kernels that copy by hand, under an interpreter with DMAs and semaphores: no race, and nothing unwritten is read.

Copies are carried out as late as they may be (when they are waited for) and as early (at once).
"""

import jax.numpy as jnp
import pytest
from kernel_cases import case_of, check

from pallas_kernels import compat
from pallas_kernels.decode_attention import stores
from pallas_kernels.kernels import KERNELS, kernel

CASES = [(name, case.name) for name in KERNELS for case in kernel(name).tests if case.races]


@pytest.mark.parametrize("dma", ["on_wait", "eager"])
@pytest.mark.parametrize(("name", "case"), CASES)
def test_copies_do_not_race(name, case, dma):
    compat.reset_interpreter()
    check(*case_of(name, case), interpret=compat.interpret_params(True, dma))
    assert not compat.found_races()


def test_every_kernel_is_among_them():
    assert {name for name, _ in CASES} == set(KERNELS)


def test_a_copy_that_nobody_waits_for_is_found(monkeypatch):
    """The check can fail."""

    class Hasty:
        def __init__(self, copy):
            self._copy = copy

        def start(self):
            self._copy.start()

        def wait(self):
            pass

    copies = stores._DenseInside.copies
    monkeypatch.setattr(stores._DenseInside, "copies", lambda *args: [Hasty(c) for c in copies(*args)])
    found, case = case_of("decode_attention", "gqa_8_h128")
    compat.reset_interpreter()
    inputs = {name: jnp.asarray(x) for name, x in case.inputs().items()}
    out = found.tpu(**inputs, **case.options, blocks=case.blocks, interpret=compat.interpret_params(True, "on_wait"))
    assert compat.found_races() or not jnp.isfinite(out).all()
    compat.reset_interpreter()
