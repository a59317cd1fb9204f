"""Saving and loading programs: round trips, kills, full disks, dtypes, and what bad paths are told."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data import data_dir

import jaxinfer as ji
from jaxinfer import device, loading, tree
from jaxinfer.models.config import ModelConfig, MoeConfig
from jaxinfer.models.transformer import random
from jaxinfer.passes.layout import LAYOUTS
from jaxinfer.program import Program
from jaxinfer.text.tokenizer import Tokenizer

CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    embed_dim=32,
    mlp_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_context=64,
    windows=(None, 8),
)
TOKENS = np.arange(20)[None] % 64
ENV = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}


def stories_path():
    if data_dir() is None:
        pytest.skip("the data folder is absent: set JAXINFER_DATA")
    return data_dir() / "models" / "stories260K"


def same_leaves(a, b):
    left, right = tree.leaves(a), tree.leaves(b)
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        np.testing.assert_array_equal(np.asarray(left[name]), np.asarray(right[name]), err_msg=name)


@pytest.mark.parametrize("layouts", [(), ("fused",), ("fused", "long_last")], ids="+".join)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moe", [None, MoeConfig(num_experts=4, experts_per_token=2, expert_dim=16, layers=(1,))])
def test_a_saved_program_comes_back_as_it_was(tmp_path, layouts, dtype, moe):
    config = ModelConfig(**{**vars(CONFIG), "moe": moe})
    model = random(config, seed=1, dtype=jnp.dtype(dtype))
    for layout in layouts:
        model = LAYOUTS[layout](model)
    program = Program(model, stop_ids=(3,), sampling={"top_p": 0.5}, layouts=layouts, name="x")
    assert ji.save(program, tmp_path / "saved") == tmp_path / "saved"
    back = ji.load(tmp_path / "saved")
    same_leaves(program.model, back.model)
    assert back.config == config
    assert (back.stop_ids, back.sampling, back.layouts, back.name) == ((3,), {"top_p": 0.5}, layouts, "x")
    np.testing.assert_array_equal(ji.logits(program, TOKENS), ji.logits(back, TOKENS))


def test_a_saved_program_keeps_its_tokenizer(tmp_path):
    program = ji.load(stories_path())
    ji.save(program, tmp_path / "saved")
    back = ji.load(tmp_path / "saved")
    assert back.tokenizer.encode("Once upon a time") == program.tokenizer.encode("Once upon a time")
    assert ji.generate_text(back, "Once upon a time", 20) == ji.generate_text(program, "Once upon a time", 20)


def test_a_saved_program_loads_in_another_dtype(tmp_path):
    program = Program(random(CONFIG))
    ji.save(program, tmp_path / "saved")
    back = ji.load(tmp_path / "saved", dtype="bfloat16")
    assert back.model.embed.table.dtype == jnp.bfloat16
    assert back.model.final_norm.scale.dtype == jnp.float32
    np.testing.assert_array_equal(back.model.embed.table, program.model.embed.table.astype(jnp.bfloat16))


def test_save_refuses_to_overwrite(tmp_path):
    (tmp_path / "saved").mkdir()
    with pytest.raises(ji.InputError, match="exists: choose another"):
        ji.save(Program(random(CONFIG)), tmp_path / "saved")


def test_a_killed_save_leaves_nothing_that_loads(tmp_path):
    script = f"""
        import os, signal
        import jaxinfer as ji
        from jaxinfer.models.transformer import random
        from jaxinfer.program import Program
        from test_loading import CONFIG

        class Killer:
            def save(self, directory):  # the arrays are written by now, the rest is not
                os.kill(os.getpid(), signal.SIGKILL)

        program = Program(random(CONFIG))
        object.__setattr__(program, "tokenizer", Killer())
        ji.save(program, {str(tmp_path / "saved")!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=ENV, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "saved").exists()
    leftovers = list(tmp_path.iterdir())
    assert leftovers, "the kill came before anything was written: the test shows nothing"
    for leftover in leftovers:
        with pytest.raises(ji.InputError):
            ji.load(leftover)
    ji.save(Program(random(CONFIG)), tmp_path / "saved")  # and the next save is not in its way
    same_leaves(ji.load(tmp_path / "saved").model, random(CONFIG))


def test_a_disk_that_fills_while_saving(tmp_path, monkeypatch):
    def full(self, directory):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Tokenizer, "save", full)
    program = ji.load(stories_path())
    with pytest.raises(ji.InputError, match="the disk is full"):
        ji.save(program, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_a_real_disk_that_fills_while_saving(tmp_path):
    """A file system of 300 kB, where Orbax's own writer runs out of space."""
    mount = f"mount -t tmpfs -o size=300k none {tmp_path}"
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("this machine gives no private mounts")
    script = f"""
        import os
        from dataclasses import replace
        import jaxinfer as ji
        from jaxinfer.models.transformer import random
        from jaxinfer.program import Program
        from test_loading import CONFIG
        try:
            ji.save(Program(random(replace(CONFIG, vocab_size=8192))), {str(tmp_path / "saved")!r})
        except ji.InputError as e:
            print("refused:", e, os.listdir({str(tmp_path)!r}))
    """
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        f'{mount} && exec "$0" "$@"',
        sys.executable,
        "-c",
        textwrap.dedent(script),
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert "refused:" in done.stdout, done.stdout + done.stderr
    assert "the disk is full" in done.stdout and done.stdout.strip().endswith("[]")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "jaxinfer.json").write_text("{"), "not the metadata"),
        (lambda d: (d / "jaxinfer.json").write_text('{"format": 99}'), "format 99"),
        (lambda d: shutil.rmtree(d / "arrays"), "can't be read"),
    ],
    ids=["cut", "newer", "no arrays"],
)
def test_damage_to_a_saved_program_is_one_line(tmp_path, damage, message):
    ji.save(Program(random(CONFIG)), tmp_path / "saved")
    damage(tmp_path / "saved")
    with pytest.raises(ji.InputError, match=message) as e:
        ji.load(tmp_path / "saved")
    assert "\n" not in str(e.value)


def test_metadata_that_lies_about_shapes_is_refused(tmp_path):
    ji.save(Program(random(CONFIG)), tmp_path / "saved")
    file = tmp_path / "saved" / "jaxinfer.json"
    metadata = json.loads(file.read_text())
    metadata["config"]["mlp_dim"] = 64
    file.write_text(json.dumps(metadata))
    with pytest.raises(ji.InputError, match="can't be read"):
        ji.load(tmp_path / "saved")


def test_a_pickle_is_never_opened(tmp_path):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    with pytest.raises(ji.InputError, match="never opened"):
        ji.load(file)


def test_unknown_names_and_dtypes_name_the_near_ones(tmp_path):
    with pytest.raises(ji.InputError, match="did you mean 'smollm2-135m'"):
        ji.load("smollm-135m")
    with pytest.raises(ji.InputError, match="did you mean 'float32'"):
        ji.load(stories_path(), dtype="float23")


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_every_dtype_loads_and_runs(dtype):
    program = ji.load(stories_path(), dtype=dtype)
    assert program.model.embed.table.dtype == jnp.dtype(dtype)
    assert np.isfinite(np.asarray(ji.logits(program, TOKENS))).all()


def test_the_device_choice_is_measured_kept_and_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(device, "_PROBE_BYTES", 3e4)
    device.measure.cache_clear()
    choice = device.choose(CONFIG)
    assert len(choice.measurements) == 2 * 2 ** len(LAYOUTS)
    (kept,) = tmp_path.glob("device-*.json")
    device.measure.cache_clear()
    kept_at = kept.stat().st_mtime_ns
    assert device.choose(CONFIG) == choice and kept.stat().st_mtime_ns == kept_at
    marked = [line for line in choice.describe() if line.startswith("->")]
    assert len(marked) == 1 and choice.dtype.name in marked[0]
    assert device.choose(CONFIG, jnp.dtype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_noise_decides_over_neither_precision_nor_layout():
    usual = ("fused", "long_last")

    def choose(dtype, layouts, seconds):
        times = dict.fromkeys([("float32", usual), ("float32", ()), ("bfloat16", usual), ("bfloat16", ())], 1.0)
        times[dtype, layouts] = seconds
        rows = [device.Measurement(d, names, prefill=t, decode=t) for (d, names), t in times.items()]
        return device._decide(tuple(rows), None)

    assert choose("float32", (), 0.95) == (jnp.float32, usual)
    assert choose("float32", (), 0.8) == (jnp.float32, ())
    assert choose("bfloat16", usual, 0.7) == (jnp.float32, usual)  # what a CPU's products promise and do not keep
    assert choose("bfloat16", usual, 0.4) == (jnp.bfloat16, usual)
    assert choose("bfloat16", (), 0.4) == (jnp.bfloat16, ())


def test_accelerators_take_bfloat16_sooner(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    usual = ("fused", "long_last")
    times = {("float32", usual): 1.0, ("bfloat16", usual): 0.7}
    rows = tuple(device.Measurement(d, names, prefill=t, decode=t) for (d, names), t in times.items())
    assert device._decide(rows, None) == (jnp.bfloat16, usual)


def test_the_compilation_cache_is_on_unless_the_user_said_otherwise(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", "/somewhere/else")
        loading.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == "/somewhere/else"
        jax.config.update("jax_compilation_cache_dir", None)
        loading.enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
