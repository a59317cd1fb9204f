"""tokamax's splash attention, where tokamax can be imported, made fit for a static profile.

Two things differ from what it runs: the list of blocks is written into the kernel as constants, which the simulator
needs (`peers.known_blocks`), and queries are multiplied by log2(e) in float32, not in bfloat16: on such a constant it
aborts, with "Expected vector-int16/bf16packed, got vector-int32".
"""

import dataclasses
import importlib
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import chips, peers

_FOLDER = "tokamax._src.ops.experimental.tpu.splash_attention."


class _Factor:
    def __rmul__(self, q: Any) -> Any:
        return (q.astype(jnp.float32) * np.float32(np.log2(np.e))).astype(q.dtype)


def attend(q: Any, k: Any, v: Any, *, causal: bool, config: dict[str, Any]) -> Any:
    """Return attention of queries `[N, T, H]`, scaled already, over keys and values `[K, S, H]`.

    `config` has fields of its `SplashConfig`, layouts by number. ImportError where tokamax is not installed.
    """
    kernel, masks, infos = (
        importlib.import_module(_FOLDER + name)
        for name in ("splash_attention_kernel", "splash_attention_mask", "splash_attention_mask_info")
    )
    shape = q.shape[1], k.shape[1]
    layouts = {x: kernel.QKVLayout(n) for x, n in config.items() if x.endswith("layout")}
    config = dataclasses.replace(kernel.SplashConfig.get_default(), **(config | layouts))
    mask = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    info, function = infos.process_mask(mask, (config.block_q, config.block_kv))
    find_bounds = infos.find_bounds

    def bounds(rows: Any) -> Any:
        with jax.ensure_compile_time_eval():
            return tuple(None if x is None else np.asarray(x) for x in find_bounds(rows))

    with (
        peers.known_blocks(chips.current().vmem_limit),
        mock.patch.object(kernel.mask_info_lib, "find_bounds", bounds),
        mock.patch.object(kernel, "LOG2E", _Factor()),
    ):
        return kernel._splash_attention_forward(
            info, q, k, v, None, None, mask_value=-1e30, is_mqa=False, config=config, save_residuals=False,
            mask_function=function, fwd_mask_sparsity=1.0,
        )  # fmt: skip
