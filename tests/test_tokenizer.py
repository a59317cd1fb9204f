"""Tokenizers: the ids that transformers and llama.cpp give, text that streams, conversations, files."""

import json
import lzma
import random
import time
from pathlib import Path

import pytest
from data import data_dir, smollm2_gguf
from gguf_files import spm_keys, write_gguf
from text_strings import CONVERSATIONS, STRINGS

from jaxinfer.checkpoint.gguf_header import read_header
from jaxinfer.errors import InputError
from jaxinfer.text.gguf_tokenizer import tokenizer_from_gguf
from jaxinfer.text.tokenizer import Tokenizer, from_huggingface

GOLDENS = json.loads(lzma.decompress((Path(__file__).parent / "goldens" / "tokenizers.json.xz").read_bytes()))


def gguf_tokenizer(path: Path) -> Tokenizer:
    return tokenizer_from_gguf(read_header(path).metadata, path)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    path = smollm2_gguf()
    if path is None:
        pytest.skip("no SmolLM2 file: set JAXINFER_SMOLLM2 to its path")
    return gguf_tokenizer(path)


@pytest.fixture(scope="module")
def stories_dir() -> Path:
    root = data_dir()
    if root is None or not (root / "models/stories260K/tokenizer.json").is_file():
        pytest.skip("no stories260K: set JAXINFER_DATA to the directory that holds models/stories260K")
    return root / "models/stories260K"


@pytest.fixture(scope="module")
def stories(stories_dir) -> Tokenizer:
    return from_huggingface(stories_dir)


@pytest.fixture(scope="module")
def stories_gguf(stories_dir, tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("spm") / "spm.gguf"
    return gguf_tokenizer(write_gguf(path, keys=spm_keys(stories_dir / "tokenizer.json")))


def byte_level() -> dict:
    """Return the metadata of the smallest byte-level vocabulary: 256 bytes, a few merges, three special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merged = ["he", "Ġw", "12"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["<|end|>", "<|user|>", "[x y]", *letters, *merged],
        "tokenizer.ggml.token_type": [3, 3, 4] + [1] * (256 + len(merged)),
        "tokenizer.ggml.merges": ["h e", "Ġ w", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
    }


def test_there_are_two_hundred_different_strings():
    assert len(STRINGS) == len(set(STRINGS)) == 200


def test_smollm2_ids_are_those_of_transformers(smollm2):
    for text, ids in zip(STRINGS, GOLDENS["smollm2"]["ids"], strict=True):
        assert smollm2.encode(text) == ids, repr(text)
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.pad_id) == (49152, 1, 2, 2)


def test_smollm2_differs_from_llama_cpp_only_before_numerals(smollm2):
    """llama.cpp cuts each numeral off first, as SmolLM2 was trained; transformers does not for GGUF files."""
    different = [t for t, ids in zip(STRINGS, GOLDENS["smollm2_llama_cpp"], strict=True) if smollm2.encode(t) != ids]
    assert different == ["  12", "x   5 apples", "if x:\n    1", "½ ¼ ¾ ² ³ ¹", "Ⅳ Ⅻ ⅷ", "①②③ ⑴⑵ ⒈"]


def test_smollm2_conversations_are_those_of_transformers(smollm2):
    for conversation, (plain, prompted) in zip(CONVERSATIONS, GOLDENS["smollm2"]["chat"], strict=True):
        assert smollm2.apply_chat(conversation, add_generation_prompt=False) == plain
        assert smollm2.apply_chat(conversation) == prompted


def test_stories_ids_are_those_of_transformers(stories):
    for text, ids in zip(STRINGS, GOLDENS["stories260K"]["ids"], strict=True):
        assert stories.encode(text) == ids, repr(text)
    assert (stories.vocab_size, stories.bos_id, stories.eos_id, stories.pad_id) == (512, 1, 2, None)


def test_sentencepiece_gguf_ids_are_those_of_llama_cpp(stories_gguf):
    for text, ids in zip(STRINGS, GOLDENS["stories260K_gguf"], strict=True):
        assert stories_gguf.encode(text) == ids, repr(text)


@pytest.mark.parametrize("name", ["smollm2", "stories", "stories_gguf"])
def test_decoding_gives_the_text_back(name, request):
    tokenizer = request.getfixturevalue(name)
    for text in STRINGS:
        if not any(mark in text for mark in ("<s>", "</s>", "<unk>", "<|", "<repo", "▁")):
            assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", ["smollm2", "stories", "stories_gguf"])
def test_streamed_pieces_add_up(name, request):
    tokenizer = request.getfixturevalue(name)
    rng = random.Random(0)
    samples = [tokenizer.encode(text) for text in STRINGS]
    samples += [[rng.randrange(tokenizer.vocab_size + 5) for _ in range(rng.randrange(1, 60))] for _ in range(100)]
    for ids in samples:
        for skip in (True, False):
            stream, pieces, at = tokenizer.stream(skip), [], 0
            while at < len(ids):
                step = rng.choice((1, 1, 1, 2, 7, 32))
                pieces.append(stream.push(ids[at : at + step]))
                at += step
            pieces.append(stream.flush())
            assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip)


def test_stream_gives_each_word_at_once_and_holds_back_parts_of_a_character(smollm2):
    stream = smollm2.stream()
    assert [stream.push([i]) for i in smollm2.encode("Hello brave world")] == ["Hello", " brave", " world"]
    stream = smollm2.stream()
    pieces = [stream.push([i]) for i in smollm2.encode("a🧑🏿‍🚀b")]
    assert "\ufffd" not in "".join(pieces) and pieces[-1] == "b"
    stream = smollm2.stream()
    half = smollm2.encode("word 漢")[:-1]
    assert stream.push(half) == "word" or stream.push([]) == ""
    assert stream.flush().endswith("\ufffd")


def test_stream_takes_time_in_proportion_to_its_length(smollm2):
    never_text = smollm2.backend.token_to_id("ÿ") or smollm2.encode("漢")[0]

    def seconds(ids: list[int]) -> float:
        stream, start = smollm2.stream(), time.perf_counter()
        for i in ids:
            stream.push([i])
        return time.perf_counter() - start

    for ids in ([never_text] * 8000, smollm2.encode("Once upon a time. " * 1600)):
        assert seconds(ids) < 5  # 32 million decoded tokens if each step looked at all before it


@pytest.mark.parametrize("name", ["smollm2", "stories", "stories_gguf"])
def test_saved_tokenizer_is_the_same(name, request, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    for field in ("bos_id", "eos_id", "pad_id", "chat_template", "vocab_size"):
        assert getattr(loaded, field) == getattr(tokenizer, field), field
    for text in STRINGS:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text, add_special=False) == tokenizer.encode(text, add_special=False)


def test_smollm2_tokenizer_is_built_quickly():
    path = smollm2_gguf()
    if path is None:
        pytest.skip("no SmolLM2 file: set JAXINFER_SMOLLM2 to its path")
    metadata, took = read_header(path).metadata, []
    for _ in range(3):
        start = time.perf_counter()
        tokenizer_from_gguf(metadata, path)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.5


def test_special_tokens_are_added_only_when_asked(stories):
    assert stories.encode("hi")[0] == stories.bos_id
    assert stories.encode("hi", add_special=False) == stories.encode("hi")[1:]
    assert stories.decode(stories.encode("hi"), skip_special=False) == "<s> hi"


@pytest.mark.parametrize(
    ("flags", "ids"),
    [({}, ["y"]), ({"bos": True}, ["<|user|>", "y"]), ({"bos": True, "eos": True}, ["<|user|>", "y", "<|end|>"])],
)
def test_gguf_flags_say_what_is_added(tmp_path, flags, ids):
    keys = {**byte_level(), **{f"tokenizer.ggml.add_{name}_token": value for name, value in flags.items()}}
    tokenizer = gguf_tokenizer(write_gguf(tmp_path / "a.gguf", keys=keys))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("y")] == ids


def test_gguf_space_prefix_is_honoured(stories_dir, tmp_path):
    keys = {**spm_keys(stories_dir / "tokenizer.json"), "tokenizer.ggml.add_space_prefix": False}
    tokenizer = gguf_tokenizer(write_gguf(tmp_path / "a.gguf", keys=keys))
    assert tokenizer.decode(tokenizer.encode("hi")) == "hi" and tokenizer.decode(tokenizer.encode(" hi")) == " hi"
    assert tokenizer.backend.encode("hi", add_special_tokens=False).tokens[0][0] == "h"


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [
        ("gpt-2", ["he", "Ġ", "12", "12", "<|end|>", "[x y]", "Ġw"]),
        ("llama-bpe", ["he", "Ġ", "12", "1", "2", "<|end|>", "[x y]", "Ġw"]),
        ("qwen2", ["he", "Ġ", "1", "2", "1", "2", "<|end|>", "[x y]", "Ġw"]),
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path, pre, tokens):
    keys = {**byte_level(), "tokenizer.ggml.pre": pre}
    tokenizer = gguf_tokenizer(write_gguf(tmp_path / "a.gguf", keys=keys))
    found = tokenizer.backend.encode("he 1212<|end|>[x y] w", add_special_tokens=False).tokens
    assert found == tokens
    assert tokenizer.decode(tokenizer.encode("[x y]<|end|>"), skip_special=True) == "[x y]"


BAD_KEYS = {
    "model": ({"tokenizer.ggml.model": "t5"}, "known kinds are gpt2 and llama"),
    "no model": ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
    "pre": ({"tokenizer.ggml.pre": "qwen3"}, "'qwen3' is not a known way to cut text; did you mean 'qwen2'"),
    "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer.ggml.tokens .* must be a list of strings"),
    "types": ({"tokenizer.ggml.token_type": [1, 1]}, "token_type .* must be 262 numbers"),
    "merge": ({"tokenizer.ggml.merges": ["a b c"]}, "'a b c' is not two tokens"),
    "foreign merge": ({"tokenizer.ggml.merges": ["he llo"]}, "do not fit tokenizer.ggml.tokens"),
    "bos": ({"tokenizer.ggml.bos_token_id": 262}, "bos_token_id .* from 0 to 261, not 262"),
    "flag": ({"tokenizer.ggml.add_bos_token": 1}, "add_bos_token .* must be a bool"),
    "scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
}


@pytest.mark.parametrize("case", BAD_KEYS)
def test_a_bad_gguf_vocabulary_gets_one_line(tmp_path, case):
    keys, pattern = BAD_KEYS[case]
    path = write_gguf(tmp_path / "a.gguf", keys={**byte_level(), **keys})
    with pytest.raises(InputError, match=pattern) as error:
        gguf_tokenizer(path)
    assert "a.gguf" in str(error.value) and "\n" not in str(error.value)
