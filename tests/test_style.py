"""What a machine can check of the manners: the linter is clean, and CI runs the command that README shows."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_linter_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^pip install .*&& pytest.*$", (ROOT / "README.md").read_text(), re.M)
    assert len(commands) == 1
    assert "grep -m1 '^pip install .*&& pytest' README.md" in (ROOT / ".ci" / "run").read_text()
