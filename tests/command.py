"""Calling the command line from tests: in this process, or in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from data import data_dir

from jaxinfer.cli import main

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "configs" / "tiny.py")


def stories_path() -> str:
    """Return the path of stories260K, or skip the test."""
    data = data_dir()
    if data is None or not (data / "models" / "stories260K").is_dir():
        pytest.skip("no models/stories260K in the data folder: set JAXINFER_DATA to the folder that has it")
    return str(data / "models" / "stories260K")


def caller(capsys):
    """Return a function that runs a command and returns its status, stdout and stderr."""

    def run(*argv) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in argv])
        return (status, *capsys.readouterr())

    return run


def process(*argv, **options) -> subprocess.Popen:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "jaxinfer.cli", *map(str, argv)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def lines_of(path: Path) -> list[dict]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]
