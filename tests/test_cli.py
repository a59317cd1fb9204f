"""The command line: one prompt, info, and what a mistake gets."""

import gc
import io
import json
import signal
import subprocess
import sys
import time
import weakref

import pytest
from command import ROOT, TINY, caller, process, stories_path

import jaxinfer as ji
from jaxinfer.cli import interrupt, main

PROMPT = "Once upon a time"


@pytest.fixture
def model():
    return stories_path()


@pytest.fixture
def cli(capsys):
    return caller(capsys)


def test_generate_streams_the_text_of_generate_text(cli, model):
    status, out, err = cli("generate", PROMPT, "--model", model, "--max-new-tokens", 40, "--dtype", "float32")
    program = ji.load(model, dtype="float32")
    assert status == 0 and out == ji.generate_text(program, PROMPT, 40) + "\n"
    assert "prompt 5 tokens, prefill " in err and "40 new tokens, decode " in err
    assert "s after the request" in err and "s after process start" in err
    assert len(err.splitlines()) == 1


def test_flags_reach_the_sampler_and_win_over_the_config(cli, model, tmp_path):
    config = tmp_path / "c.py"
    config.write_text(
        "from jaxinfer.configuration import defaults\ndef get_config(argument=None):\n    config = defaults()\n"
        f"    config.model, config.dtype = {model!r}, 'float32'\n"
        "    config.generate.max_new_tokens, config.generate.stop = 40, ['park', 'zzz']\n    return config\n"
    )
    program = ji.load(model, dtype="float32")
    options = dict(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1)
    flags = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), value)]
    status, out, _ = cli("generate", PROMPT, "--config", config, "--seed", 3, "--stop", "zzz", *flags)
    want = ji.generate_text(program, PROMPT, 40, seed=3, stop=["zzz"], **options)
    assert (status, out) == (0, want + "\n")
    status, out, _ = cli("generate", PROMPT, "--config", config)
    assert (status, out) == (0, ji.generate_text(program, PROMPT, 40, stop=["park"]) + "\n") and "park" not in out


def test_a_prompt_may_come_from_stdin_or_be_a_question(cli, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi"))
    status, piped, err = cli("generate", "-", "--config", TINY, "--max-new-tokens", 8)
    assert status == 0 and "prompt 2 tokens" in err
    assert piped == cli("generate", "Hi", "--config", TINY, "--max-new-tokens", 8)[1]
    _, _, err = cli("generate", "Hi", "--config", TINY, "--max-new-tokens", 8, "--chat")
    assert f"prompt {len('user: Hi' + chr(10) + 'assistant: ')} tokens" in err


def test_info_tells_what_a_model_is(cli, model):
    status, out, _ = cli("info", model, "--json", "--dtype", "bfloat16")
    report = json.loads(out)
    assert status == 0 and report["parameters"]["total"] == 260_032 == sum(report["parameters"].values()) // 2
    assert report["bytes_stored"] == {"float32": 260_032 * 4}
    assert report["bytes_in_memory"] == {"bfloat16": 2 * (260_032 - 704), "float32": 4 * 704}
    assert report["kv_bytes_per_token"] == 2 * 5 * 4 * 8 * 2
    assert report["tokenizer"]["stop_tokens"] == ["<s>", "</s>"] and report["device"]["dtype"] == "bfloat16"
    status, out, _ = cli("info", model)
    for line in ("parameters     260,032", "context        512 tokens", "KV cache ", "compile cache "):
        assert line in out
    assert "window" not in out and "experts" not in out


def test_info_needs_no_weights(cli, tmp_path):
    status, out, _ = cli("info", "--config", TINY)
    assert status == 0 and "139,584" in out and "256 tokens, a chat template" in out


def test_info_reads_what_save_wrote(cli, model, tmp_path):
    ji.save(ji.load(model, dtype="float32"), tmp_path / "saved")
    report = json.loads(cli("info", tmp_path / "saved", "--json")[1])
    assert report["parameters"]["total"] == 260_032 and report["tokenizer"]["tokens"] == 512


@pytest.mark.parametrize(
    "argv, message",
    [
        (["generate"], "give either a PROMPT or --prompts FILE"),
        (["generate", "a", "--prompts", "p"], "give either a PROMPT or --prompts FILE"),
        (["generate", "--prompts", "p"], "--prompts FILE and --out FILE need each other"),
        (["generate", "a", "--modle", "x"], "unrecognized arguments: --modle x; see jaxinfer --help"),
        (["generate", "a", "--top-k", "x"], "argument --top-k: invalid int value: 'x'; see jaxinfer generate --help"),
        (["generate", "a", "--max-new-tokens", "0"], "max_new_tokens=0: must be 1 or more"),
        (["generate", "a", "--temperature", "-1"], "temperature=-1.0: must be 0 (greedy) or more"),
        (["generate", "a", "--stop", ""], "stop='': must be text"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "a", "--dtype", "bfloat"], "dtype='bfloat': did you mean 'bfloat16'"),
        (["generate", "a", "--model", "smollm2-136m"], "'smollm2-136m': no such path, nor a known name; did you mean"),
        (["generate", "a", "--config", "absent.py"], "config 'absent.py': no such file"),
        (["generate", "x" * 256, "--config", TINY], "prompt of 256 tokens: the model's context is 256"),
        (["info", "a", "--model", "b"], "MODEL is given already"),
        (["eval", "--task", "chess", "--data", "x"], "invalid choice: 'chess'"),
        (["eval", "--task", "lambada", "--data", "absent.jsonl"], "absent.jsonl: no such file"),
        (["tell"], "invalid choice: 'tell'"),
        ([], "required: COMMAND"),
    ],
)
def test_mistakes_are_one_line_and_status_2(cli, argv, message):
    status, out, err = cli(*argv)
    assert status == 2 and out == "" and message in err
    assert err.startswith("jaxinfer: error: ") and len(err.splitlines()) == 1


def test_other_errors_are_one_line_until_debug_is_asked(cli, monkeypatch):
    def fail(error):
        def load(*_, **__):
            raise error

        monkeypatch.setattr("jaxinfer.configuration.from_config", load)

    fail(RuntimeError("first\nsecond"))
    status, _, err = cli("generate", "a", "--config", TINY)
    assert (status, err) == (1, "jaxinfer: error: RuntimeError: first second; run with --debug for the traceback\n")
    for argv in (["--debug", "generate", "a"], ["generate", "a", "--debug"]):
        with pytest.raises(RuntimeError):
            main([*argv, "--config", TINY])
    fail(OSError(28, "No space left on device", "/x/y"))
    assert cli("generate", "a", "--config", TINY)[::2] == (2, "jaxinfer: error: /x/y: No space left on device\n")
    fail(KeyboardInterrupt())
    assert cli("generate", "a", "--config", TINY)[0] == 130


def test_help_and_version(cli, capsys):
    for argv, words in (
        (["--version"], "jaxinfer "),
        (["--help"], "generate"),
        (["generate", "--help"], "--batch-size"),
        (["chat", "--help"], "/reset"),
    ):
        with pytest.raises(SystemExit) as e:
            main(argv)
        assert e.value.code == 0 and words in capsys.readouterr().out


def test_help_does_not_wait_for_jax():
    code = "import sys; from jaxinfer.cli import _parser; _parser(); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_ctrl_c_ends_a_process_with_130_and_one_line():
    child = process("generate", "-", "--config", TINY, stdin=subprocess.PIPE)
    time.sleep(2)  # it waits for its prompt
    child.send_signal(signal.SIGINT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, "", "jaxinfer: interrupted\n")


def gc_callback(press):
    gc.callbacks.append(lambda *_: press())
    gc.collect()


def weak_callback(press):
    class Thing:
        pass

    thing = Thing()
    thing.itself, thing.watch = thing, weakref.ref(thing)  # only a collection ends it
    keep = weakref.ref(thing, lambda _: press())
    del thing
    gc.collect()
    del keep


def finalizer(press):
    class Thing:
        def __del__(self):
            press()

    Thing()


@pytest.mark.parametrize("place", [gc_callback, weak_callback, finalizer])
def test_ctrl_c_where_python_drops_exceptions_is_not_lost(place):
    pressed = []

    def press():
        if not pressed:
            pressed.append(True)
            signal.raise_signal(signal.SIGINT)

    handler, hook, callbacks = signal.getsignal(signal.SIGINT), sys.unraisablehook, list(gc.callbacks)
    interrupt.install()
    try:
        place(press)
        assert pressed
        with pytest.raises(KeyboardInterrupt):
            time.sleep(10)
    finally:
        gc.callbacks[:] = callbacks
        signal.signal(signal.SIGINT, handler)
        sys.unraisablehook = hook


def test_an_error_behind_ctrl_c_is_told_apart():
    error = RuntimeError("torn")
    error.__context__ = KeyboardInterrupt()
    assert interrupt.behind(error) and not interrupt.behind(RuntimeError())


def test_a_reader_that_leaves_is_no_error():
    child = process("generate", "a", "--config", TINY, "--max-new-tokens", 200)
    child.stdout.read(1)
    child.stdout.close()
    err = child.stderr.read()
    child.wait(timeout=60)
    assert "Traceback" not in err and "error" not in err and "Exception ignored" not in err
