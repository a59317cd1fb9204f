"""Many processes that run one program: every one runs the same command, and the first writes what comes out.

A process that dies ends the others: its neighbours in a collective fail at once, the rest within `HEARTBEAT` seconds.
Nothing that was written is lost, and the same commands go on from there.
"""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np

from jaxinfer.errors import InputError

HEARTBEAT = 20  # seconds without a sign of life after which a process counts as dead
_AUTO = "auto"


def join(spec: str) -> None:
    """Join the processes of "ADDRESS:PORT,COUNT,INDEX", or of the cluster that JAX finds itself in, with "auto".

    Only the first process prints. Call it before JAX has looked for devices.

    Raises:
        InputError: a spec of another form, or the others did not come.
    """
    import jax

    options = {} if spec == _AUTO else _parse(spec)
    _keep_stdout()
    try:
        jax.distributed.initialize(
            **options,
            heartbeat_timeout_seconds=HEARTBEAT,
            initialization_timeout=120,
            shutdown_timeout_seconds=HEARTBEAT,
        )
    except (RuntimeError, ValueError) as e:
        reason = " ".join(str(e).split())[:200]
        raise InputError(
            f"distributed={spec}: {reason}; start all of them, with the first one's address, count and own index"
        ) from None
    if index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def _keep_stdout() -> None:
    """Have what native libraries print go to stderr: gloo greets on stdout, which is for what the command gives."""
    sys.stdout.flush()
    own = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, buffering=1)
    os.dup2(2, 1)
    sys.stdout = own


def count() -> int:
    """Return how many processes there are; does not wake JAX's devices."""
    return _state()[0]


def index() -> int:
    """Return which of them this is; the first is 0."""
    return _state()[1]


def same_file(path: str | Path) -> Path:
    """Return a file of the first process as each one is to see it and write to it: the first itself, the others a copy.

    So all of them find the same work done already, on a shared disk or not, and one copy is kept.
    """
    path = Path(path)
    if count() == 1:
        return path
    from jax.experimental import multihost_utils

    data = path.read_bytes() if index() == 0 and path.is_file() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    own = np.frombuffer(data, np.uint8) if index() == 0 else np.zeros(size, np.uint8)
    data = np.asarray(multihost_utils.broadcast_one_to_all(own), np.uint8).tobytes() if size else b""
    if index() == 0:
        return path
    copy = Path(tempfile.mkdtemp(prefix="jaxinfer-process-")) / path.name
    if size:
        copy.write_bytes(data)
    return copy


def lost(error: BaseException) -> str | None:
    """Return what to say of an error that the loss of another process has made, or None of any other."""
    text = str(error)
    signs = ("Gloo", "gloo", "heartbeat", "coordination", "Connection closed", "connection reset", "DEADLINE_EXCEEDED")
    if count() == 1 or type(error).__name__ != "JaxRuntimeError" or not any(sign in text for sign in signs):
        return None
    return (
        f"process {index()} of {count()}: another process has ended or can't be reached "
        f"({' '.join(text.split())[:120]}); start the same commands again: what was finished is kept"
    )


def _state() -> tuple[int, int]:
    """Return count and index. JAX's own questions for them would look for devices, whose number is not settled yet."""
    distributed = sys.modules.get("jax._src.distributed")
    if distributed is None or distributed.global_state.client is None:
        return 1, 0
    return distributed.global_state.num_processes, distributed.global_state.process_id


def _parse(spec: str) -> dict[str, object]:
    parts = spec.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not all(p.isdecimal() for p in parts[1:]):
        raise InputError(f"distributed={spec!r}: must be ADDRESS:PORT,COUNT,INDEX, such as 10.0.0.1:8476,4,0, or auto")
    processes, own = int(parts[1]), int(parts[2])
    if not own < processes:
        raise InputError(f"distributed={spec!r}: index {own} must be in 0..{processes - 1}")
    return dict(coordinator_address=parts[0], num_processes=processes, process_id=own)
