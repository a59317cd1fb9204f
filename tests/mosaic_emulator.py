"""A Mosaic GPU kernel emulated in Python: every warpgroup a thread, its arrays those of NumPy.

jax's own interpreter knows no matrix products. What is emulated is what the kernels here use: copies that land late,
on memory that holds NaN meanwhile; barriers whose phases may not be overrun; products of arrays. Layouts, swizzles and
registers are not: `pallas_kernels/aot_gpu.py` compiles those.
"""

import contextlib
import functools
import threading
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

_thread = threading.local()
PATIENCE = 60.0  # seconds that a warpgroup waits before the kernel is said to hang


class Ref:
    """A window of an array, that may reach beyond it: there are zeros, and what is written there is lost."""

    def __init__(self, array: np.ndarray, index: tuple = ()):
        self._array, self._index = array, index
        self.at = _At(self)

    @property
    def dtype(self):
        return self._array.dtype

    @property
    def shape(self):
        return self.read().shape

    def read(self) -> np.ndarray:
        found = self._array
        for index in self._index:
            found = _take(found, index)
        return found

    def __getitem__(self, index):
        found = _take(self.read(), index if isinstance(index, tuple) else (index,))
        return jnp.asarray(found)

    def __setitem__(self, index, value):
        assert index is Ellipsis
        target, value = self._array, np.asarray(value)
        for index in self._index[:-1]:
            target = target[_plain(index)]
        if not self._index:
            target[...] = value
            return
        inside, cut = [], []
        for at, size in zip(self._index[-1], target.shape, strict=False):
            if not isinstance(at, slice):
                inside.append(int(at))
                continue
            inside.append(slice(max(at.start, 0), min(at.stop, size)))
            cut.append(slice(max(-at.start, 0), max(min(at.stop, size) - at.start, 0)))
        target[tuple(inside)] = value[tuple(cut)]


class _Transposed:
    """A matrix with its axes exchanged."""

    def __init__(self, ref):
        self._ref = ref

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self._ref.read().T, dtype)

    def __setitem__(self, index, value):
        self._ref[index] = np.asarray(value).T


class _At:
    def __init__(self, ref):
        self._ref = ref

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        return Ref(self._ref._array, (*self._ref._index, _plain(index)))


def _plain(index):
    return tuple(i if isinstance(i, slice) else int(i) for i in index)


def _take(array, index):
    if index == (Ellipsis,):
        return array
    for axis in reversed(range(len(index))):
        at = index[axis]
        if not isinstance(at, slice):
            beyond = not 0 <= int(at) < array.shape[axis]
            array = np.zeros_like(np.take(array, 0, axis)) if beyond else np.take(array, int(at), axis)
            continue
        if at.start is None:
            continue
        rows = np.arange(at.start, at.stop)
        good = (rows >= 0) & (rows < array.shape[axis])
        found = np.zeros((*array.shape[:axis], len(rows), *array.shape[axis + 1 :]), array.dtype)
        found[(slice(None),) * axis + (good,)] = np.take(array, rows[good], axis=axis)
        array = found if not good.all() else array[(slice(None),) * axis + (slice(at.start, at.stop),)]
    return array


class Barrier:
    """Barriers: each completes a phase with every `num_arrivals` arrivals."""

    def __init__(self, *, num_arrivals: int = 1, num_barriers: int = 1):
        self._arrivals, self._lock = num_arrivals, threading.Condition()
        self._arrived, self._waited = [0] * num_barriers, {}
        self.at = _AtBarrier(self)

    def arrive(self, i):
        with self._lock:
            self._arrived[i] += 1
            self._lock.notify_all()

    def wait(self, i):
        key = threading.get_ident(), i
        with self._lock:
            mine = self._waited.get(key, 0)
            if not self._lock.wait_for(lambda: self._arrived[i] // self._arrivals > mine, PATIENCE):
                raise TimeoutError(f"barrier {i}: phase {mine} never completes")
            assert self._arrived[i] // self._arrivals == mine + 1, f"barrier {i}: phase {mine} is overrun"
            self._waited[key] = mine + 1


class _AtBarrier:
    def __init__(self, barrier):
        self._barrier = barrier

    def __getitem__(self, i):
        return types.SimpleNamespace(
            arrive=functools.partial(self._barrier.arrive, int(i)), wait=functools.partial(self._barrier.wait, int(i))
        )


class _Acc:
    """An accumulator; a product is added when it is waited for."""

    def __init__(self, shape, dtype=jnp.float32, value=None):
        self.value = jnp.zeros(shape, dtype) if value is None else value

    @staticmethod
    def init(value):
        return _Acc(None, value=value)


def _wgmma(acc, a, b):
    a, b = (jnp.asarray(x.read() if isinstance(x, Ref) else np.asarray(x)).astype(jnp.float32) for x in (a, b))
    acc.value += jnp.dot(a, b, precision="highest")


def _nothing(shape, dtype):
    """Return what nobody has written: NaN, or of integers the largest."""
    whole = jnp.issubdtype(dtype, jnp.integer)
    return np.full(shape, jnp.iinfo(dtype).max if whole else np.nan, dtype)


def _copy_in(source, target, barrier):
    found = source.read().copy()
    target[...] = _nothing(target.shape, target.dtype)

    def land():
        target[...] = found
        barrier.arrive()

    threading.Timer(0.002, land).start()


def _run_scoped(body, *shapes, collective_axes=None, **named):
    del collective_axes
    return body(*shapes, **named)  # what all warpgroups share is made once a block


def _run_state(body):
    def run(state):
        if isinstance(state, _Acc):
            body(state)
            return state.value
        refs = [x if isinstance(x, _Acc) else Ref(np.array(x)) for x in state]
        body(refs)
        return tuple(x.value if isinstance(x, _Acc) else x[...] for x in refs)

    return run


def _fori_loop(start, end, body, carry):
    for i in range(int(start), int(end)):
        carry = body(jnp.int32(i), carry)
    return carry


_plgpu = types.SimpleNamespace(
    SMEM=lambda shape, dtype, transforms=(): Ref(_nothing(shape, dtype)),
    Barrier=Barrier,
    ACC=_Acc,
    TilingTransform=lambda tiling: None,
    SwizzleTransform=lambda swizzle: None,
    Layout=types.SimpleNamespace(WGMMA=types.SimpleNamespace(reduce=lambda axis: None), WGMMA_TRANSPOSED=None),
    layout_cast=lambda x, layout: x,
    broadcasted_iota=lambda dtype, shape, axis, layout: jax.lax.broadcasted_iota(dtype, shape, axis),
    set_max_registers=lambda count, action: None,
    copy_gmem_to_smem=_copy_in,
    copy_smem_to_gmem=lambda source, target: target.__setitem__(Ellipsis, source.read()),
    wait_smem_to_gmem=lambda count, wait_read_only=False: None,
    commit_smem=lambda: None,
    barrier_wait=lambda barrier: barrier.wait(),
    barrier_arrive=lambda barrier: barrier.arrive(),
    wgmma=_wgmma,
    wgmma_accumulator_load=lambda acc, wait_n=0: acc.value,
)
_pl = types.SimpleNamespace(
    ds=lambda start, size: slice(int(start), int(start) + size),
    when=lambda condition: lambda body: body() if bool(condition) else None,
    run_scoped=_run_scoped,
    run_state=_run_state,
)
_lax = types.SimpleNamespace(
    axis_index=lambda name: jnp.int32(_thread.index[name]),
    fori_loop=_fori_loop,
    cond=lambda condition, yes, no, x: yes(x) if bool(condition) else no(x),
    optimization_barrier=lambda x: x,
    broadcast_in_dim=jax.lax.broadcast_in_dim,
    div=jax.lax.div,
    rem=jax.lax.rem,
)


def _kernel(memory):
    def make(body, *, name, out_type, grid, grid_names, num_threads, thread_name, interpret=False):
        def run(*arrays):
            refs = [Ref(np.array(x)) for x in arrays]
            refs += [Ref(_nothing(x.shape, x.dtype)) for x in out_type]
            for at in np.ndindex(*grid):
                held, failures = memory(), []

                def group(n, at=at, held=held, failures=failures):
                    _thread.index = dict(zip(grid_names, at, strict=True)) | {thread_name: n}
                    try:
                        body(*refs, memory=held)
                    except BaseException as error:
                        failures.append(error)

                threads = [threading.Thread(target=group, args=(n,)) for n in range(num_threads)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                if failures:
                    raise failures[0]
            return tuple(jnp.asarray(x.read()) for x in refs[len(arrays) :])

        return run

    return make


@contextlib.contextmanager
def emulated(launch: Any, *bodies: Any) -> Iterator[None]:
    """Emulate the kernels that the module `launch` calls, whose bodies are in the modules `bodies`."""
    held: list[Any] = []
    scratch = launch.scratch

    def remember(*args):
        held[:] = [lambda: scratch(*args)]
        return scratch(*args)

    named = (("plgpu", _plgpu), ("pl", _pl), ("lax", _lax))
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            *((body, name, value) for body in bodies for name, value in named),
            (launch, "scratch", remember),
            (launch.compat, "transposed", _Transposed),
            (launch.compat, "load", lambda ref, layout: ref[...]),
            (launch.compat, "gpu_kernel", _kernel(lambda: held[0]())),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        yield
