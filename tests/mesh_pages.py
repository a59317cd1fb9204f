"""Fork and join sessions whose pages are on eight simulated devices; print what they say, hold and move."""

import json
from typing import Any

import jax
import numpy as np
from mesh_laws import FORMS, base, compiled_step

from jaxinfer.decode import loop
from jaxinfer.passes import apply
from jaxinfer.plan import hlo
from jaxinfer.program import Program
from jaxinfer.session import Session
from jaxinfer.sharding.shard import shard
from jaxinfer.speculation import speculative

MESH, PAGE = "data=2,model=4", 8
CACHES = {"dense": (), "kv_paged": (("kv_paged", {"page": PAGE}),), "kv_paged_int4": (FORMS["kv_paged_int4"],)}
TEXT = (np.arange(200) * 7 % 96).tolist()
ROWS = [TEXT[:75], TEXT[20:60], TEXT[5:22], TEXT[100:163]]
FORKS = {  # rows of a session, and of which its branches are; of four rows a device has two
    "one": (1, [0, 0, 0, 0]),
    "stay": (4, [0, 1, 1, 0, 3, 3, 3, 2]),
    "go": (4, [3, 2, 1, 0]),
    "three": (4, [0, 1, 3]),
}
ASKED = {"dense": ("go", "three"), "kv_paged": ("one", "stay", "go", "three"), "kv_paged_int4": ("one", "stay", "go")}


def decoded(session: Session) -> list[list[int]]:
    """Return what a session decodes."""
    out: list[list[int]] = [[] for _ in session.rows]
    for new in session.decode(6):
        out = [row + more for row, more in zip(out, new, strict=True)]
    return out


def talk(program: Program, rows: int, of: list[int]) -> list[list[list[int]]]:
    """Return what branches decode, what branches of these do, last one first, and what one row does that joins them."""
    session = Session(program, rows)
    session.feed(ROWS[:rows], room=40)
    branches = session.fork([TEXT[i : 2 * i] for i in range(len(of))], room=12, of=of)
    out = [decoded(branches)]
    deeper = branches.fork([[i] for i in range(len(of))], room=12, of=list(range(len(of)))[::-1])
    out.append(decoded(deeper))
    if rows == 1:
        session.join(deeper, deeper.rows[-1], room=12)
        out.append(decoded(session))
    return out


def held(program: Program, of: list[int]) -> dict[str, Any]:
    """Return the bytes that a device holds of four rows' caches and of a fork of them, and what fork and step move."""
    session = Session(program, 4)
    session.feed(ROWS, room=40)
    rows, length = np.array(of, np.int32), np.array([len(ROWS[row]) for row in of], np.int32)
    forked = loop.fork(session._cache, rows, length, room=64)
    fork = loop._fork.lower(session._cache, rows, length, room=64).compile()
    step, _ = compiled_step(program.model, 4, 1, 256)

    def device_bytes(cache: Any) -> int:
        return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache.layers))

    return {
        "bytes": [device_bytes(session._cache), device_bytes(forked)], "stays": session._cache.stays(rows),
        "moved": [[[c.kind, c.bytes] for c in hlo.read(x.as_text()).collectives] for x in (fork, step)],
    }  # fmt: skip


def main() -> None:
    """Print a line of each cache and fork."""
    jax.config.update("jax_num_cpu_devices", 8)
    for cache, spec in CACHES.items():
        one = apply(base("dense"), *spec)
        for name in ASKED[cache]:
            want, got = talk(one, *FORKS[name]), talk(shard(MESH)(one), *FORKS[name])
            print(json.dumps({"cache": cache, "fork": name, "same": got == want, "tokens": want[0]}), flush=True)
        if cache == "kv_paged":
            got = talk(shard(MESH)(speculative(one, adapt=False)), *FORKS[name])
            print(json.dumps({"cache": cache, "fork": "drafts", "same": got == want, "tokens": want[0]}), flush=True)
        print(json.dumps({"cache": cache, "held": held(shard(MESH)(one), FORKS["stay"][1])}), flush=True)


if __name__ == "__main__":
    main()
