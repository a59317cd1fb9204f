"""The replay of published times: where it goes on after it was stopped, and what it makes of an entry that fails."""

import json
import subprocess

import replay_measured


def test_a_stopped_replay_goes_on_with_the_entries_that_are_missing(tmp_path, monkeypatch, capsys):
    out, ran = tmp_path / "replay.jsonl", []
    before = [{"chip": "v5e", "entry": 0, "ratio": 0.5}, {"chip": "tpu7x", "entry": 1, "ratio": 9.0}]
    out.write_text("".join(json.dumps(line) + "\n" for line in before))
    found = [{"lhs": [n], "groups": [1], "measured_us": 10.0} for n in range(3)]
    monkeypatch.setattr(replay_measured, "entries", lambda folder: found)
    monkeypatch.setattr(replay_measured, "replayed", lambda number, *_: ran.append(number) or {"ratio": 2.0})
    replay_measured.main(["--tokamax", "none", "--out", str(out)])
    assert ran == [1, 2]
    assert [json.loads(line) for line in out.read_text().splitlines()][2:] == [
        {"chip": "v5e", "entry": n, "lhs": [n], "measured_us": 10.0, "ratio": 2.0} for n in (1, 2)
    ]
    assert "of 3 of 3: geometric mean 1.26, median 2.00, from 0.50 to 2.00" in capsys.readouterr().out


def test_an_entry_that_takes_too_long_or_aborts_says_so(monkeypatch):
    def run(command, timeout, **_):
        if timeout < 5:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, -6, stdout=answer, stderr="it\nbroke")

    monkeypatch.setattr(replay_measured.subprocess, "run", run)
    answer = "no line"
    assert replay_measured.replayed(0, {}, [], 1) == {"error": "no result after 1 s"}
    assert replay_measured.replayed(0, {}, [], 9) == {"error": "it broke"}
    answer = '{"predicted_us": 5}'
    assert replay_measured.replayed(0, {"measured_us": 4.0}, [], 9) == {"predicted_us": 5, "ratio": 1.25}
