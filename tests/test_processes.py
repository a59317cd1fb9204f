"""Several processes on this machine run one program; one of them dies; the same commands go on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from command import ROOT, TINY, caller, lines_of
from meshes import FLAGS

from jaxinfer.sharding import processes

ENDS_WITHIN = 60  # seconds from the death of one process to the end of the others, as the launch recipes say


def start(count: int, *command: str) -> list[subprocess.Popen]:
    """Start a command in so many processes; `@` in an argument becomes each one's address, count and index."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return [
        subprocess.Popen(
            [sys.executable, *(part.replace("@", f"{address},{count},{i}") for part in command)],
            cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(count)
    ]  # fmt: skip


def ends(running: list[subprocess.Popen], timeout: float) -> list[tuple[int, str, str]]:
    """Return the status, stdout and stderr of each process; none is left behind."""
    try:
        told = [process.communicate(timeout=timeout) for process in running]
        return [(process.returncode, *texts) for process, texts in zip(running, told, strict=True)]
    finally:
        for process in running:
            process.kill()


@pytest.mark.parametrize(("count", "mesh"), [(4, "data=2,model=2"), (2, "stage=2")])
def test_processes_generate_compare_and_train_as_one_does(count, mesh):
    """On two by two, and on a stage each; and all but the first are silent."""
    (_, out, err), *others = ends(start(count, "tests/mesh_processes.py", "@", mesh), 600)
    assert out, err[-2000:]
    found = json.loads(out)
    alone, divided = found["alone"], found["divided"]
    assert divided["tokens"] == alone["tokens"]
    for name in ("perplexity", "losses", "kl"):
        np.testing.assert_allclose(divided[name], alone[name], rtol=1e-3 if name == "kl" else 1e-5)
    assert alone["losses"][1] < alone["losses"][0]
    assert [(status, text) for status, text, _ in others] == [(0, "")] * (count - 1)


def test_two_processes_of_which_one_dies_end_and_go_on(tmp_path, capsys):
    """The other ends with an error within a minute; what was answered before is not answered again."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(9)))
    out, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    options = ["--config", TINY, "--prompts", str(prompts), "--batch-size", "2", "--max-new-tokens", "12"]
    command = ["-m", "jaxinfer.cli", "generate", *options, "--out", str(out), "--mesh", "data=2,model=2"]
    command += ["--distributed", "@"]
    running = start(2, *command)
    limit = time.monotonic() + 300
    while not (out.is_file() and len(lines_of(out)) >= 2) and time.monotonic() < limit and running[0].poll() is None:
        time.sleep(0.02)
    os.kill(running[1].pid, signal.SIGKILL)
    died = time.monotonic()
    (status, _, err), _ = ends(running, ENDS_WITHIN + 60)
    assert time.monotonic() - died < ENDS_WITHIN
    before = out.read_text()
    assert 2 <= len(lines_of(out)) < 9, "the process was killed too late to show anything"
    assert status == 3 and "another process has ended or can't be reached" in err.splitlines()[-1], err[-2000:]
    again = ends(start(2, *command), 300)
    assert [status for status, _, _ in again] == [0, 0], again[0][2][-2000:]
    assert out.read_text().startswith(before) and sorted(row["index"] for row in lines_of(out)) == list(range(9))
    assert caller(capsys)("generate", *options, "--out", alone)[0] == 0
    texts = [{row["index"]: row["text"] for row in lines_of(path)} for path in (out, alone)]
    assert texts[0] == texts[1]


def test_two_processes_compare_as_one_does_and_a_table_goes_on_with_its_rows(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("a text of some words, " * 40)
    counts = ("--window", "64", "--prompt-tokens", "16", "--decode-tokens", "4", "--rounds", "1")
    options = ["compare", "--config", TINY, "--pass", "int8", "--data", f"perplexity={text}", *counts]
    mesh = ["--mesh", "data=2", "--distributed", "@"]
    command = ["-m", "jaxinfer.cli", *options, "--out", str(tmp_path / "two"), *mesh]
    (status, table, err), (other, silent, _) = ends(start(2, *command), 300)
    assert (status, other, silent) == (0, 0, "") and "int8" in table, err[-2000:]
    before = (tmp_path / "two" / "results.jsonl").read_text()
    (status, _, err), _ = ends(start(2, *command), 300)
    assert status == 0 and err.count("measured already") == 2, err[-2000:]
    assert (tmp_path / "two" / "results.jsonl").read_text() == before
    assert caller(capsys)(*options, "--out", tmp_path / "one")[0] == 0
    one, two = ([row["quality"] for row in lines_of(tmp_path / name / "results.jsonl")] for name in ("one", "two"))
    assert len(one) == 2
    for alone, divided in zip(one, two, strict=True):
        np.testing.assert_allclose(divided["perplexity"]["value"], alone["perplexity"]["value"], rtol=1e-5)


@pytest.mark.parametrize("spec", ["10.0.0.1,2,0", "10.0.0.1:8476,2", "10.0.0.1:8476,2,2", "host:1,two,0"])
def test_a_spec_that_names_no_place_is_refused(spec, capsys):
    status, _, err = caller(capsys)("generate", "Hi", "--config", TINY, "--mesh", "data=2", "--distributed", spec)
    assert status == 2 and err.startswith(f"jaxinfer: error: distributed='{spec}'") and processes.count() == 1


@pytest.mark.parametrize(
    ("recipe", "tool", "settings"),
    [
        ("tpu_pod.sh", "gcloud", {"NAME": "slice", "ZONE": "here"}),
        ("gke_xpk.sh", "xpk", {"CLUSTER": "c", "NAME": "n", "TYPE": "v5litepod-16", "IMAGE": "i"}),
        ("slurm.sh", "srun", {}),
    ],
)
def test_a_recipe_runs_the_command_that_it_is_given(recipe, tool, settings, tmp_path):
    """With a tool that runs here what it is told to run there; an argument keeps its spaces."""
    runs = 'case "$*" in *--command*) eval "${@: -1}";; *) "${@:2}";; esac'
    for name, text in ((tool, runs), ("jaxinfer", 'printf "%s\\n" "$@"')):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {**os.environ, **settings, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = ["bash", str(ROOT / "configs" / "launch" / recipe), "generate", "two words", "--mesh", "model=8"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["generate", "two words", "--mesh", "model=8", "--distributed", "auto"], (
        done.stderr
    )
