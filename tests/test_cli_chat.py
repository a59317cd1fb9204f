"""Conversations: what the cache keeps, how an answer is stopped, and where a conversation ends."""

import io
import signal
import subprocess

import numpy as np
import pytest
from command import TINY, caller, process, stories_path

from jaxinfer import tree
from jaxinfer.cli import chat
from jaxinfer.models.transformer import random
from jaxinfer.session import Session
from jaxinfer.text.bytes import byte_tokenizer


@pytest.fixture
def model():
    return stories_path()


@pytest.fixture
def cli(capsys):
    return caller(capsys)


@pytest.fixture
def letters(monkeypatch):
    """Make the tiny config's model say letters only, so that its answers, read again, are the same tokens."""

    def model(config, seed=0, dtype="float32"):
        drawn = random(config, seed, dtype)
        said = np.isin(np.arange(256), byte_tokenizer().encode("abcdefghijklmnopqrstuvwxyz"))
        table = drawn.embed.table * np.where(said, 1.0, 1e-3).astype(np.float32)[:, None]  # the rest scores near 0
        return tree.replace(drawn, embed=tree.replace(drawn.embed, table=table))

    monkeypatch.setattr("jaxinfer.configuration.random", model)


def talk(monkeypatch, cli, *said, options=()):
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(text + "\n" for text in said)))
    return cli("chat", "--config", TINY, "--max-new-tokens", 6, *options)


@pytest.fixture
def computed(monkeypatch):
    """Return the list of (tokens given, tokens computed) of every feed that follows."""
    seen = []
    feed = Session.feed

    def spy(self, rows, *args, **options):
        count = feed(self, rows, *args, **options)
        seen.append((len(rows[0]), count))
        return count

    monkeypatch.setattr(Session, "feed", spy)
    return seen


def test_chat_computes_only_what_is_new(cli, monkeypatch, letters, computed):
    status, out, _ = talk(monkeypatch, cli, "hello", "how are you", "/reset", "hello", options=["--system", "S"])
    answers = out.splitlines()
    assert status == 0 and len(answers) == 3 and answers[0] == answers[2] != ""
    first = "system: S\nuser: hello\nassistant: "
    second = f"{first}{answers[0]}\nuser: how are you\nassistant: "
    assert [given for given, _ in computed] == [len(first), len(second), len(first)]
    # The second turn computes the last token of the answer, which was never fed, and what follows it.
    assert computed[0][1] == len(first) and computed[1][1] == len("x\nuser: how are you\nassistant: ")
    assert computed[2][1] == 1  # after /reset the same beginning is in the cache already


def test_chat_answers_what_a_fresh_program_would(cli, monkeypatch, letters):
    _, out, _ = talk(monkeypatch, cli, "hello", "and?")
    answers = out.splitlines()
    conversation = f"user: hello\nassistant: {answers[0]}\nuser: and?\nassistant: "
    _, alone, _ = cli("generate", conversation, "--config", TINY, "--max-new-tokens", 6)
    assert alone == answers[1] + "\n"


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said(cli, monkeypatch, letters, computed):
    before, answer = signal.getsignal(signal.SIGINT), chat.Conversation.answer

    def press_after_three_pieces(self, text, interrupt):
        for i, piece in enumerate(answer(self, text, interrupt)):
            if i == 2 and text == "hello":
                signal.raise_signal(signal.SIGINT)
            yield piece

    _, whole, _ = talk(monkeypatch, cli, "hello", options=["--max-new-tokens", 40])
    monkeypatch.setattr(chat.Conversation, "answer", press_after_three_pieces)
    status, out, err = talk(monkeypatch, cli, "hello", "again", options=["--max-new-tokens", 40])
    said = out.splitlines()
    assert status == 0 and "(stopped)" in err and len(said) == 2
    assert len(said[0]) == 1 + 1 + 2 and whole.startswith(said[0])  # the first three dispatches, not 40 tokens
    given, new = computed[-1]
    assert given == len(f"user: hello\nassistant: {said[0]}\nuser: again\nassistant: ")
    assert new == len("x\nuser: again\nassistant: ")  # the cache survived
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_twice_at_the_prompt_leaves(cli, monkeypatch):
    presses = iter([KeyboardInterrupt, "hi", KeyboardInterrupt, KeyboardInterrupt, "never"])

    def read(tty):
        said = next(presses)
        if said is KeyboardInterrupt:
            raise KeyboardInterrupt
        return said

    monkeypatch.setattr(chat, "_read", read)
    status, _, err = cli("chat", "--config", TINY, "--max-new-tokens", 2)
    assert status == 0 and err.count("Ctrl-C again, or /quit, to leave") == 2 and next(presses) == "never"


def test_a_conversation_that_outgrows_the_context_can_go_on_after_reset(cli, monkeypatch):
    status, out, err = talk(monkeypatch, cli, "x" * 300, "hi", "y" * 200, "y" * 60, "/reset", "hi", "/nope", "/help")
    assert status == 0 and "conversation is 318 tokens, the model's context is 256; start a new one with /reset" in err
    assert "the conversation is forgotten" in err and "/nope: no such command" in err
    _, alone, _ = talk(monkeypatch, cli, "hi")
    assert out.startswith(alone) and out.endswith(alone)


def test_chat_needs_a_template_and_good_flags(cli, model):
    assert "no chat template" in cli("chat", "--model", model)[2]
    status, _, err = cli("chat", "--config", TINY, "--top-p", 2)
    assert status == 2 and "top_p=2.0: must be in (0, 1]" in err


def test_a_chat_from_a_pipe_ends_with_it():
    child = process("chat", "--config", TINY, "--max-new-tokens", 4, stdin=subprocess.PIPE)
    out, err = child.communicate("hi\n", timeout=120)
    assert child.returncode == 0 and out.endswith("\n") and "Traceback" not in err
