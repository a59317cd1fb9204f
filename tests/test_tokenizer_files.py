"""Tokenizers in Hugging Face checkpoints, chat templates, and the errors of both."""

import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxinfer.errors import InputError
from jaxinfer.text.tokenizer import Tokenizer, from_huggingface

USER = [{"role": "user", "content": "é<"}]


def backend(**vocabulary: int) -> tokenizers.Tokenizer:
    """Return a tokenizer of whole words."""
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return made


def checkpoint(directory: Path, config: dict | None = None, **files: object) -> Path:
    """Write a checkpoint's tokenizer; `files` are more JSON files by stem."""
    (directory / "tokenizer.json").write_text(backend(a=0, b=1, B=2, E=3, P=4).to_str())
    for stem, value in {"tokenizer_config": config, **files}.items():
        if value is not None:
            (directory / f"{stem}.json").write_text(json.dumps(value))
    return directory


def test_roles_are_read_in_every_spelling(tmp_path):
    config = {"bos_token": "B", "eos_token": {"content": "E", "lstrip": False}, "pad_token": None}
    tokenizer = from_huggingface(checkpoint(tmp_path, config, special_tokens_map={"pad_token": "P", "bos_token": "a"}))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 4)
    assert tokenizer.encode("aBb") == [0, 2, 1]
    assert tokenizer.decode([0, 2, 1]) == "a b" or tokenizer.decode([0, 2, 1]) == "ab"


@pytest.mark.parametrize(
    ("flags", "ids"),
    [({}, [0]), ({"add_bos_token": True}, [2, 0]), ({"add_bos_token": True, "add_eos_token": True}, [2, 0, 3])],
)
def test_config_says_what_is_added(tmp_path, flags, ids):
    tokenizer = from_huggingface(checkpoint(tmp_path, {"bos_token": "B", "eos_token": "E", **flags}))
    assert tokenizer.encode("a") == ids
    assert tokenizer.encode("a", add_special=False) == [0]


def test_a_role_outside_the_vocabulary_adds_no_token(tmp_path):
    tokenizer = from_huggingface(checkpoint(tmp_path, {"pad_token": "[PAD]"}))
    assert tokenizer.pad_id is None and tokenizer.vocab_size == 5


def test_padding_and_truncation_left_in_the_file_are_ignored(tmp_path):
    made = backend(a=0, b=1)
    made.enable_truncation(2)
    made.enable_padding(length=9)
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    assert from_huggingface(tmp_path).encode("a b a b") == [0, 1, 0, 1]


@pytest.mark.parametrize(
    "template",
    ["x", [{"name": "tool_use", "template": "y"}, {"name": "default", "template": "x"}]],
    ids=["one", "list"],
)
def test_template_of_the_config(tmp_path, template):
    directory = checkpoint(tmp_path, {"chat_template": template})
    assert from_huggingface(directory).apply_chat(USER) == "x"
    (directory / "chat_template.jinja").write_text("z")
    assert from_huggingface(directory).apply_chat(USER) == "z"


def test_missing_files_say_what_to_do(tmp_path):
    with pytest.raises(InputError, match=r"has no tokenizer\.json: save it with transformers"):
        from_huggingface(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"only a tokenizer\.model, which must be converted: .*save_pretrained"):
        from_huggingface(tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "pattern"),
    [
        ("tokenizer.json", "{", "tokenizer.json is not a tokenizer"),
        ("tokenizer.json", "[1]", "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds a JSON list"),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"0": 3}}', "added_tokens_decoder"),
        ("tokenizer_config.json", '{"chat_template": [3]}', "chat_template"),
    ],
)
def test_broken_files_get_one_line(tmp_path, file, text, pattern):
    (checkpoint(tmp_path) / file).write_text(text)
    with pytest.raises(InputError, match=pattern) as error:
        from_huggingface(tmp_path)
    assert "\n" not in str(error.value)


def test_cleaning_up_spaces(tmp_path):
    """Byte-pair vocabularies ignore the flag, as in transformers; others would need it."""
    directory = checkpoint(tmp_path, {"clean_up_tokenization_spaces": True})
    assert from_huggingface(directory).encode("a b") == [0, 1]
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    (directory / "tokenizer.json").write_text(words.to_str())
    with pytest.raises(InputError, match="clean_up_tokenization_spaces true for a WordLevel"):
        from_huggingface(directory)


def chat(template: str, **roles: int) -> Tokenizer:
    return Tokenizer(backend(B=0, E=1), chat_template=template, **roles)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "Bé<E"),
        ("{{ pad_token }}|{{ pad_token is defined }}", "|False"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "é<"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "é<"\n}'),
        ("{% if add_generation_prompt %}\n  yes\n{% endif %}\n", "  yes\n"),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("a{% generation %}{{ messages[0].role }}{% endgeneration %}b", "auserb"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{{ tools is none }}{{ strftime_now('%Y') | length }}", "True4"),
    ],
)
def test_templates_see_what_transformers_gives_them(template, text):
    assert chat(template, bos_id=0, eos_id=1).apply_chat(USER) == text


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("{{ raise_exception('roles\nmust alternate') }}", "refused the messages: roles must alternate"),
        ("{% for %}", "chat template"),
        ("{{ messages[0].nothing.more }}", "nothing"),
        ("{{ messages[0].content + 1 }}", "chat template refused"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_template_that_refuses_gets_one_line(template, pattern):
    with pytest.raises(InputError, match=pattern) as error:
        chat(template).apply_chat(USER)
    assert "\n" not in str(error.value)


def test_no_template_is_said():
    with pytest.raises(InputError, match="has no chat template"):
        Tokenizer(backend(a=0)).apply_chat(USER)


def test_bad_text_and_bad_ids_are_refused():
    tokenizer = Tokenizer(backend(a=0))
    with pytest.raises(InputError, match=r"lone surrogate '\\ud83d' at character 1"):
        tokenizer.encode("a\ud83d")
    for ids in ([-1], [2**40]):
        with pytest.raises(InputError, match="token id"):
            tokenizer.decode(ids)
        with pytest.raises(InputError, match="token id"):
            tokenizer.stream().push(ids)
    assert tokenizer.decode([0, 999]) == "a"
