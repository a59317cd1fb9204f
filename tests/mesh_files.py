"""Load checkpoints onto eight simulated devices, save them, and restore them on other meshes; print what was seen."""

import json
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from models import GOLDENS
from safetensors.numpy import save_file

import jaxinfer as ji
from jaxinfer.sharding.fitting import unfit
from jaxinfer.tree import leaves

CONFIG = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=8192, hidden_size=512, intermediate_size=2048,
    num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8, head_dim=64, max_position_embeddings=256,
    rms_norm_eps=1e-6, rope_theta=1e4, hidden_act="silu", tie_word_embeddings=False,
)  # fmt: skip


def write_checkpoint(directory: Path) -> None:
    """Write a Llama of 42 M weights, in bfloat16 as checkpoints are."""
    D, F, V = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    matrices = {"self_attn.q": (D, D), "self_attn.k": (D, D), "self_attn.v": (D, D), "self_attn.o": (D, D)}
    matrices |= {"mlp.gate": (F, D), "mlp.up": (F, D), "mlp.down": (D, F)}
    shapes = {"model.embed_tokens.weight": (V, D), "lm_head.weight": (V, D), "model.norm.weight": (D,)}
    for i in range(CONFIG["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}_proj.weight": shape for name, shape in matrices.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{i}.{name}.weight": (D,) for name in norms}
    rng = np.random.default_rng(0)
    arrays = {n: (rng.random(s, np.float32) / 16).astype(ml_dtypes.bfloat16) for n, s in shapes.items()}
    save_file(arrays, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))


def memory(kind: str) -> int:
    """Return the bytes of memory that this process has (VmRSS), or has had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def check_memory(directory: Path) -> dict:
    """Return how much memory a load onto all devices takes, and how much of each tensor a device has."""
    ji.load(GOLDENS / "llama2", dtype="float32", mesh="data=8")  # what loading itself brings in
    before = memory("VmRSS")
    program = ji.load(directory, dtype="float32", mesh="model=8")
    rise = memory("VmHWM") - before
    found = leaves(program.model)
    matrices = [leaf for leaf in found.values() if leaf.ndim > 1]
    return {
        "bytes": sum(leaf.nbytes for leaf in found.values()),
        "rise": rise,
        "parts": sorted({leaf.nbytes / leaf.addressable_shards[0].data.nbytes for leaf in matrices}),
    }


def same(program: ji.Program, other: ji.Program) -> bool:
    """Return whether two programs have the same arrays, each key head once, whatever lies where."""
    one, two = (leaves(unfit(p.model)) for p in (program, other))
    return one.keys() == two.keys() and all(np.array_equal(one[p], two[p]) for p in one)


def check_saved(scratch: Path) -> dict:
    """Return whether what is saved from one mesh, with passes and repeated heads, comes back on others and on none."""
    ids = (np.arange(24) * 7 % 64).reshape(2, 12)
    source = GOLDENS / "llama_mqa"
    plain = ji.apply(ji.load(source, dtype="float32"), "int8")
    program = ji.apply(ji.load(source, dtype="float32", mesh="data=2,model=4"), "int8")
    path = ji.save(program, scratch / "divided")
    moved = ji.load(path, mesh="data=4,model=2")
    alone = ji.load(ji.save(plain, scratch / "alone"), mesh="data=2,model=4")  # one device's, with its layouts
    return {
        "largest": float(np.abs(ji.logits(moved, ids) - ji.logits(plain, ids)).max()),
        "same": [same(program, other) for other in (ji.load(path), moved, alone)],
        "devices": len(moved.model.embed.table.scale.sharding.device_set),
        "heads": [p.model.layers[0].attention.num_kv_heads for p in (program, ji.load(path), moved)],
    }


def main() -> None:
    """Print a line."""
    jax.config.update("jax_num_cpu_devices", 8)
    scratch = Path(sys.argv[1])
    write_checkpoint(scratch)
    print(json.dumps({"memory": check_memory(scratch), "saved": check_saved(scratch)}))


if __name__ == "__main__":
    main()
