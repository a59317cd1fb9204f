"""Text to token ids and back, the whole text at once or a stream of it, and the tokenizer's files.

The work is done by the `tokenizers` library; this module adds what surrounds it in a Hugging Face checkpoint: which
tokens begin, end and pad a sequence, whether they are added, and how a conversation is written (chat.py).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers
from tokenizers import processors

from jaxinfer.errors import InputError
from jaxinfer.text.chat import render_chat
from jaxinfer.text.stream import Detokenizer

_FIX = "save it with transformers: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)"
_ROLES = ("bos_token", "eos_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary with its rules, the ids that have a role, and the template of a conversation."""

    backend: tokenizers.Tokenizer = dataclasses.field(repr=False)
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    chat_template: str | None = dataclasses.field(default=None, repr=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, the added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Return the ids of `text`; special tokens written in it are recognised.

        `add_special` adds what the model expects around a text, such as the token that begins one.
        Raises InputError where `text` is not valid Unicode (a lone surrogate).
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special).ids
        except (UnicodeEncodeError, TypeError):
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise InputError(
                f"text has the lone surrogate {text[at]!r} at character {at}, which no UTF-8 text can hold: "
                "decode its bytes with errors='replace'"
            ) from None

    def decode(self, ids: Iterable[SupportsIndex], skip_special: bool = True) -> str:
        """Return the text of `ids`, without special tokens unless `skip_special` is false.

        Ids past the vocabulary (a model's embedding may be padded) have no text. Raises InputError for a negative id.
        """
        ids = [int(i) for i in ids]
        try:
            return self.backend.decode(ids, skip_special_tokens=skip_special)
        except OverflowError:
            bad = next(i for i in ids if not 0 <= i < 2**32)
            raise InputError(f"token id {bad} is not between 0 and {self.vocab_size - 1}") from None

    def apply_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
        """Return `messages`, each a dict with a role and a content, as the text that the model was trained on.

        Encode it with `add_special=False`: the template writes the special tokens itself. Raises InputError when
        there is no template, or when the template refuses the messages.
        """
        if self.chat_template is None:
            raise InputError(
                "this tokenizer has no chat template: give the model plain text, or use an instruction-tuned checkpoint"
            )
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        tokens = {name: self.backend.id_to_token(i) for name, i in ids.items() if i is not None}
        return render_chat(self.chat_template, messages, add_generation_prompt, tokens)

    def stream(self, skip_special: bool = True) -> Detokenizer:
        """Return an incremental decoder, for text that is shown while it is generated."""
        return Detokenizer(self.backend, skip_special)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, which `from_huggingface` and transformers read."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        for role, i in zip(_ROLES, (self.bos_id, self.eos_id, self.pad_id), strict=True):
            config[role] = None if i is None else self.backend.id_to_token(i)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (directory / "tokenizer.json").write_text(self.backend.to_str(), encoding="utf-8")
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> "Tokenizer":
        """Read what `save` wrote."""
        return from_huggingface(directory)


def from_huggingface(directory: str | Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face checkpoint.

    tokenizer.json is required. tokenizer_config.json names the tokens with a role and may override whether they are
    added; special_tokens_map.json is asked for what it leaves out; the chat template is in chat_template.jinja or in
    the config. `clean_up_tokenization_spaces` is ignored for byte-pair vocabularies, as transformers does, because it
    would remove spaces that the text had; with any other it is refused. Raises InputError when a file is missing or not
    what it should be.
    """
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        alone = ", only a tokenizer.model, which must be converted" if (directory / "tokenizer.model").is_file() else ""
        raise InputError(f"{directory} has no tokenizer.json{alone}: {_FIX}")
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as e:  # the library raises bare Exception
        raise InputError(f"{path} is not a tokenizer that the tokenizers library reads: {_line(e)}") from None
    config = _read_json(directory / "tokenizer_config.json")
    if config.get("clean_up_tokenization_spaces") and not isinstance(backend.model, tokenizers.models.BPE):
        raise InputError(
            f"{directory}/tokenizer_config.json has clean_up_tokenization_spaces true for a "
            f"{type(backend.model).__name__} vocabulary, which is not supported: set it to false"
        )
    fallback = _read_json(directory / "special_tokens_map.json")
    backend.no_truncation()  # a limit or padding left in the file is the trainer's, not the reader's
    backend.no_padding()
    added = config.get("added_tokens_decoder") or {}
    if not isinstance(added, dict) or not all(isinstance(entry, dict) for entry in added.values()):
        raise InputError(
            f"{directory}/tokenizer_config.json: added_tokens_decoder must be an object of objects: {_FIX}"
        )
    for entry in added.values():
        _add_known(backend, entry, bool(entry.get("special")))
    tokens = {role: _content(config.get(role) or fallback.get(role)) for role in _ROLES}
    for role in _ROLES:
        _add_known(backend, config.get(role) or fallback.get(role), True)
    ids = {role: None if token is None else backend.token_to_id(token) for role, token in tokens.items()}
    if "add_bos_token" in config or "add_eos_token" in config:
        first = tokens["bos_token"] if config.get("add_bos_token") else None
        last = tokens["eos_token"] if config.get("add_eos_token") else None
        set_added(backend, first, last)
    return Tokenizer(backend, ids["bos_token"], ids["eos_token"], ids["pad_token"], _template(directory, config))


def set_added(backend: tokenizers.Tokenizer, first: str | None, last: str | None) -> None:
    """Make `backend` add the token `first` before a text and `last` after it; None adds nothing."""
    around = [token for token in (first, last) if token is not None]
    single = [*([first] if first is not None else []), "$A", *([last] if last is not None else [])]
    special = [(token, backend.token_to_id(token)) for token in dict.fromkeys(around)]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)


def _add_known(backend: tokenizers.Tokenizer, token: Any, special: bool) -> None:
    """Let `backend` find `token` in a text, if the vocabulary has it: a new one would have no embedding."""
    content = _content(token)
    if content is None or backend.token_to_id(content) is None:
        return
    if any(known.content == content for known in backend.get_added_tokens_decoder().values()):
        return
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    options = {k: bool(token[k]) for k in flags if k in token} if isinstance(token, dict) else {"normalized": False}
    backend.add_tokens([tokenizers.AddedToken(content, special=special, **options)])


def _content(token: Any) -> str | None:
    """Return the text of a token that a config gives as a string or as an object with a `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    """Return the chat template: a file of its own wins over the config, whose named ones give `default`."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
        template = {entry.get("name"): entry.get("template") for entry in template}
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values()), None))
    if template is not None and not isinstance(template, str):
        raise InputError(
            f"{directory}/tokenizer_config.json: chat_template is {template!r:.80}, "
            "and it must be a string or a list of objects with a name and a template"
        )
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file, or an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        raise InputError(f"{path} is not JSON: {_line(e)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a JSON {type(value).__name__}, not the object expected: write it again")
    return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
