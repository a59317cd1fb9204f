"""The tokenizer that a GGUF file carries in its metadata: a vocabulary, and the name of the rules that go with it."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jaxinfer.errors import InputError, nearest
from jaxinfer.text.tokenizer import Tokenizer, set_added

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
_SPACE = "\u2581"  # how SentencePiece writes a space

# How a text is cut before its bytes are merged, by tokenizer.ggml.pre; None is GPT-2's own rule. SmolLM was trained
# with each digit cut off first; for its GGUF files transformers leaves that out, and we give the same ids. SmolLM's
# merges join no digits, so the two rules differ only in the spaces before a digit and in characters such as ½.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CUTS: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "smollm"), None),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "smaug-bpe", "dbrx"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
# Llama 3 looks a piece of text up whole before it merges its bytes, and begins texts with BOS unless told not to.
_LLAMA3_NAMES = frozenset(("llama-bpe", "llama3", "llama-v3", "falcon3"))


def tokenizer_from_gguf(metadata: Mapping[str, Any], path: str | Path) -> Tokenizer:
    """Build the tokenizer that the metadata of the GGUF file at `path` describes.

    Two kinds are known: `gpt2`, byte-level BPE, cut as tokenizer.ggml.pre says, and `llama`, SentencePiece BPE with
    byte fallback, whose merges follow from the scores. Control tokens become special tokens, and user-defined ones
    tokens that are found whole in a text.

    Raises InputError, naming the file and the key, for another kind, an unknown tokenizer.ggml.pre, and for lists and
    ids that are missing, have the wrong type or do not fit together.
    """
    keys = _Keys(metadata, path)
    kind = keys.get("model", str)
    if kind not in ("gpt2", "llama"):
        raise keys.fail("model", f"the known kinds are gpt2 and llama, not {kind!r:.80}")
    tokens = keys.strings("tokens")
    types = keys.numbers("token_type", len(tokens), np.full(len(tokens), _NORMAL))
    roles = {role: keys.token_id(f"{role}_token_id", len(tokens)) for role in ("bos", "eos", "unknown", "padding")}
    if kind == "gpt2":
        tokens = _in_byte_letters(tokens, types)
        backend, add_bos = _byte_level(keys, tokens)
    else:
        tokens = [_SPACE * len(t) if t and not t.strip(" ") else t for t in tokens]
        unknown = None if roles["unknown"] is None else tokens[roles["unknown"]]
        backend, add_bos = _sentencepiece(keys, tokens, types, unknown), True
    named = [tokens[i] for i in roles.values() if i is not None]
    special = [tokens[i] for i in np.flatnonzero(types == _CONTROL)]
    backend.add_special_tokens(_added(dict.fromkeys([*special, *named]), special=True))
    user = [tokens[i] for i in np.flatnonzero(types == _USER) if tokens[i].strip(_SPACE) and tokens[i] not in named]
    backend.add_tokens(_added(user, special=False))

    bos, eos = roles["bos"], roles["eos"]
    first = tokens[bos] if bos is not None and keys.get("add_bos_token", bool, add_bos) else None
    last = tokens[eos] if eos is not None and keys.get("add_eos_token", bool, False) else None
    if first is not None or last is not None:
        set_added(backend, first, last)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(backend, bos, eos, roles["padding"], template if isinstance(template, str) else None)


def _in_byte_letters(tokens: list[str], types: np.ndarray) -> list[str]:
    """Respell the tokens that are not written in the byte alphabet, but for those that are found whole in a text."""
    spelling = _byte_spelling()
    letters = frozenset(spelling)
    if letters.issuperset("".join(tokens)):
        return tokens
    whole = np.isin(types, (_CONTROL, _USER))
    return [t if w or letters.issuperset(t) else _spell(t, spelling) for t, w in zip(tokens, whole, strict=True)]


def _byte_level(keys: "_Keys", tokens: list[str]) -> tuple[tokenizers.Tokenizer, bool]:
    """Return the tokenizer, and whether texts begin with BOS where the file does not say."""
    pre = keys.get("pre", str, "default")
    if pre not in _CUTS:
        raise keys.fail("pre", f"{pre!r:.80} is not a known way to cut text; {nearest(pre, _CUTS)}")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for merge in keys.strings("merges"):
        pair = merge.split(" ")
        if len(pair) != 2:
            raise keys.fail("merges", f"{merge!r:.80} is not two tokens with a space between")
        merges.append((pair[0], pair[1]))
    backend = _bpe(keys, vocab, merges, ignore_merges=pre in _LLAMA3_NAMES)
    cut = _CUTS[pre]
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if cut is not None:
        split = pre_tokenizers.Split(Regex(cut), behavior="isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend, pre in _LLAMA3_NAMES


def _sentencepiece(keys: "_Keys", tokens: list[str], types: np.ndarray, unknown: str | None) -> tokenizers.Tokenizer:
    scores = keys.numbers("scores", len(tokens)).astype(np.float64)
    # User-defined tokens are found before anything is merged; their scores say nothing.
    user = np.flatnonzero(types == _USER)
    scores[user] = np.inf
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _bpe(
        keys, vocab, _merges(tokens, types, scores, vocab), unk_token=unknown, byte_fallback=True, fuse_unk=True
    )
    gemma = str(keys.metadata.get("general.architecture", "")).startswith("gemma")
    prefix = keys.get("add_space_prefix", bool, not gemma)
    to_marks = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_marks]) if prefix else to_marks
    strip = [decoders.Strip(" ", left=1)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _merges(
    tokens: list[str], types: np.ndarray, scores: np.ndarray, vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return the pairs that SentencePiece would join, best first: every way to divide a token into two others."""
    mergeable = np.flatnonzero(np.isin(types, (_NORMAL, _USER, _UNUSED)))
    order = mergeable[np.lexsort((mergeable, -scores[mergeable]))]
    merges = []
    for token in map(tokens.__getitem__, order):
        # of one token's pairs, the one with the longest first half wins
        for cut in range(len(token) - 1, 0, -1):
            left = token[:cut]
            if left in vocab:
                right = token[cut:]
                if right in vocab:
                    merges.append((left, right))
    return merges


def _bpe(keys: "_Keys", vocab: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, **options))
    except Exception as e:  # the library raises bare Exception, for a merge of tokens that the vocabulary lacks
        raise keys.fail("merges", f"they do not fit tokenizer.ggml.tokens ({' '.join(str(e).split())})") from None


def _added(tokens: Iterable[str], special: bool) -> list[AddedToken]:
    return [AddedToken(token, special=special, normalized=False) for token in tokens if token]


@functools.cache
def _byte_spelling() -> tuple[str, ...]:
    """Return GPT-2's letter for each byte: itself where it is printable, else the next unused one from U+0100."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


def _spell(token: str, spelling: Sequence[str]) -> str:
    return "".join(spelling[byte] for byte in token.encode("utf-8"))


class _Keys:
    """Typed look-up of the tokenizer's keys."""

    def __init__(self, metadata: Mapping[str, Any], path: str | Path):
        self.metadata, self.path = metadata, path

    def fail(self, key: str, problem: str) -> InputError:
        state = "cannot be used" if f"tokenizer.ggml.{key}" in self.metadata else "is missing"
        return InputError(f"{self.path}: tokenizer.ggml.{key} {state}: {problem}; convert the model again")

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if type(value) is not kind:
            raise self.fail(key, f"it must be a {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        # the header's reader makes a list of strings only
        if not isinstance(value, list):
            raise self.fail(key, "it must be a list of strings")
        return value

    def numbers(self, key: str, count: int, default: np.ndarray | None = None) -> np.ndarray:
        value = self.metadata.get(f"tokenizer.ggml.{key}", default)
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise self.fail(key, f"it must be {count} numbers, one for each token")
        return value

    def token_id(self, key: str, count: int) -> int | None:
        value = self.metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise self.fail(key, f"it must be a token's number, from 0 to {count - 1}, not {value!r:.80}")
        return value
