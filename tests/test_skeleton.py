"""Answers in points: a list is read, its points are written at once and shown in order, and no list means no points."""

import pytest
from command import caller

from jaxinfer import skeleton
from jaxinfer.cli.skeleton import _InOrder
from jaxinfer.errors import InputError
from jaxinfer.session import Session

QUESTION = "How do I rest?"
POINTS = ("Sleep", "Eat well", "Walk")


@pytest.fixture
def cli(capsys):
    return caller(capsys)


@pytest.fixture
def config(tmp_path):
    """Return the path of a config of a random model of bytes, with room for a conversation."""
    path = tmp_path / "c.py"
    path.write_text(
        "from jaxinfer.configuration import defaults\nfrom ml_collections import ConfigDict\n"
        "def get_config(argument=None):\n    config = defaults()\n    config.dtype = 'float32'\n"
        "    config.architecture = ConfigDict(dict(family='llama', vocab_size=256, embed_dim=32, mlp_dim=64,\n"
        "        num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, max_context=1024))\n"
        "    config.generate.max_new_tokens = 12\n    return config\n"
    )
    return path


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("1. Sleep\n2. Eat well.\n\n3. **Walk**:\nDone.", POINTS),
        ("1) Sleep\n 2) Eat well\n3) Walk\n3) Walk more", POINTS),
        ("1. Sleep\n2. Eat well\n3. Walk\n4. Eat well\n5. Read", POINTS),  # it began to repeat itself
        ("1. Sleep\n3. Eat well", ("Sleep",)),
        ("1.", ()),
        ("\n".join(f"{i}. p{i}" for i in range(1, 15)), tuple(f"p{i}" for i in range(1, 11))),
    ],
)
def test_the_points_of_a_list_are_read(text, points):
    assert skeleton.find_points(text) == points


def test_points_are_shown_in_order_as_they_come(capsys):
    out = _InOrder(POINTS)
    out.push([" Go to", "", " Now"], [False, False, False])
    assert capsys.readouterr().out == "1. Sleep: Go to"
    out.push([" bed. ", " Greens", "."], [False, True, False])  # a space may be the end
    assert capsys.readouterr().out == " bed."
    out.push(["\n", "", ""], [True, True, False])
    assert capsys.readouterr().out == "\n2. Eat well: Greens\n3. Walk: Now."
    out.push(["", "", ""], [True, True, True])
    assert capsys.readouterr().out == "\n"


@pytest.mark.parametrize("options", [(), ("--pass", "kv_paged:page=16", "--temperature", 1, "--seed", 3)], ids=str)
def test_a_skeleton_is_written_at_once_as_it_is_one_by_one(cli, config, monkeypatch, options):
    """Only the list is given: a random model writes none."""
    monkeypatch.setattr(skeleton, "find_points", lambda text: POINTS)
    status, out, err = cli("generate", QUESTION, "--skeleton", "--time-saved", "--config", config, *options)
    at = [out.index(f"{i}. {point}:") for i, point in enumerate(POINTS, 1)]
    assert status == 0 and at == sorted(at)
    lines = err.splitlines()
    assert len(lines) == 3 and lines[0].startswith("outline of 3 points: ")
    assert lines[1].startswith("3 points at once: 36 tokens in ")
    assert "3 rounds in turns: at once " in lines[2] and lines[2].endswith("; 3 of 3 points the same text")


def test_a_model_that_plans_nothing_answers_as_usual(cli, config):
    status, out, err = cli("generate", QUESTION, "--skeleton", "--config", config)
    first, second = err.splitlines()
    assert status == 0 and first == "the model gave no outline of two points or more; it answers as usual"
    assert "12 new tokens" in second
    assert out == cli("generate", QUESTION, "--chat", "--config", config)[1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompts", "p", "--out", "o", "--skeleton"], "--skeleton answers one PROMPT, not --prompts FILE"),
        (["a", "--time-saved"], "--time-saved compares two ways to write a skeleton's points; add --skeleton"),
        (["", "--skeleton"], "the prompt is empty"),
        (["x" * 1100, "--skeleton"], "the model's context is 1024"),
    ],
)
def test_mistakes_are_one_line_and_status_2(cli, config, argv, message):
    status, out, err = cli("generate", *argv, "--config", config)
    assert status == 2 and out == "" and message in err and len(err.splitlines()) == 1


def test_a_program_without_a_chat_template_is_refused(stories):
    with pytest.raises(InputError, match="no chat template"):
        skeleton.outline(Session(stories), QUESTION)
