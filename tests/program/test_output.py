"""What commands print while they run: live, as JSON lines, or nothing."""

import json
import signal
from datetime import datetime

import pytest
import yaml
from processes import Command, flags
from runs import command, finish, read
from stores import cache_config
from terminal import STYLE, screens

NUMBERS = {"done", "total", "seconds", "rate", "left"}


def training(material, out, *more, **settings) -> list[str]:
    _, _, _, *words = command(material, out, "--no-bf16", *more, **settings)
    return words


def events(stderr: str) -> list[dict]:
    """Every line is a JSON object with a time and a kind."""
    found = [json.loads(line) for line in stderr.splitlines()]
    for one in found:
        assert datetime.fromisoformat(one["time"]).tzinfo and one["event"]
    return found


def test_training_on_a_terminal(material, store_path, tmp_path):
    process = Command(
        *training(material, tmp_path / "run", epochs=10), columns=80, TERM="xterm", NO_COLOR="1"
    )
    assert process.wait(300) == 0, process.printed()
    written = process.messages()
    process.close()
    assert not STYLE.search(written)
    *before, left = screens(written)
    views = [one[-7:] for one in before if one and one[-1].startswith("  D ")]
    assert views
    for head, rates, *rows in views:
        assert head.split()[1] == "Training" and "/50" in head and len(head) <= 80
        assert rates.split()[1::2] == ["pairs/s", "tokens/s"]
        assert [row.split()[0] for row in rows] == ["loss", "u", "margin", "reward_accuracy", "D"]
    logged = [line for line in read(tmp_path / "run") if line["split"] == "train"]
    losses = {f"{line['loss']:.4g}" for line in logged}
    assert {view[2].split()[2] for view in views} <= losses
    assert [line.split()[0] for line in left[-3:-1]] == ["Training", left[-2].split()[0]]
    assert "50/50" in left[-3] and left[-2].endswith(" tokens/s")
    assert left[-1].startswith("the trained model is in")


def test_ctrl_c_on_a_terminal_leaves_the_message_alone(material, store_path, tmp_path):
    words = training(material, tmp_path / "run", epochs=2000)
    process = Command(*words, columns=80, TERM="xterm")
    process.until(lambda: "reward_accuracy" in process.messages())
    process.kill(signal.SIGINT)
    assert process.wait(60) == 130
    left = screens(process.messages())[-1]
    process.close()
    assert left[-3].startswith("stopped; resume from what was last saved with")
    assert left[-1].startswith("no checkpoint has been saved yet, so it will start over")
    assert not any("Training" in line or "loss" in line for line in left)


def test_json_logs(material, store_path, tmp_path):
    store = tmp_path / "new.zarr"
    words = ["cache", *flags(cache_config(material, store))]
    found = events(finish([*"...", *words, "--json-logs"]).stderr)
    assert {one["event"] for one in found} == {"message", "progress"}
    assert f"{store} is complete" in found[-1]["message"]
    *_, scoring = (one for one in found if "Scoring" in one.get("description", ""))
    assert scoring.keys() > NUMBERS and scoring["done"] == scoring["total"] == 21
    assert scoring["left"] is None and scoring["metrics"].keys() == {"tokens_per_second", "margin"}
    assert scoring["rate"] == pytest.approx(scoring["pairs_per_second"])
    assert scoring["tokens_per_second"] > scoring["pairs_per_second"]

    out = tmp_path / "run"
    done = finish([*"...", *training(material, out, "--json-logs")])
    found = events(done.stderr)
    assert done.returncode == 0 and done.stdout == ""
    *_, steps = (one for one in found if one.get("description") == "Training")
    last = read(out)[-2]
    for name in ("loss", "u", "margin", "reward_accuracy"):
        assert steps["metrics"][name] == last[name]
    distance = last["distance_chosen"] + last["distance_rejected"]
    assert steps["metrics"]["D"] == pytest.approx(distance / 2)
    assert steps["pairs_per_second"] == pytest.approx(steps["rate"] * 17 / 5)

    refused = finish([*"...", *training(material, out, "--json-logs", beta=3.0)])
    (error,) = (one for one in events(refused.stderr) if one["event"] == "error")
    assert refused.returncode == 2 and "holds a run with other settings" in error["message"]
    assert "--overwrite" in error["hint"]


def test_a_mistake_in_the_flags_is_a_json_line():
    done = finish([*"...", "train", "--json-logs", "--epocs", "3"])
    (error,) = events(done.stderr)
    assert done.returncode == 2 and error["event"] == "error" and "--epocs" in error["message"]


def test_a_stopped_run_reports_it_as_json(material, store_path, tmp_path):
    words = training(material, tmp_path / "run", "--json-logs", epochs=2000)
    process = Command(*words)
    process.until((tmp_path / "run/metrics.jsonl").exists)
    process.kill(signal.SIGTERM)
    assert process.wait(60) == 143
    *_, last = events(process.messages())
    process.close()
    assert last["event"] == "stopped" and "--json-logs" in last["resume"]


def test_quiet_prints_errors_alone(material, store_path, tmp_path):
    words = ["cache", *flags(cache_config(material, tmp_path / "new.zarr")), "--quiet"]
    done = finish([*"...", *words])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    out = tmp_path / "run"
    done = finish([*"...", *training(material, out, "--quiet")])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    refused = finish([*"...", *training(material, out, "--quiet", beta=3.0)])
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    shown = finish([*"...", "inspect", str(store_path), "--json", "--quiet"])
    assert json.loads(shown.stdout)["pairs"]["kept"] == 21 and shown.stderr == ""


def test_a_file_may_set_the_flags(material, store_path, tmp_path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"json-logs": True, "quiet": True}))
    words = [*"...", "train", "--config", str(tmp_path / "c.yaml"), "--cache", "none.zarr"]
    (error,) = events(finish(words).stderr)
    assert error["message"] == "none.zarr does not exist"


def test_the_commands_of_a_grid_print_in_the_same_way(material, store_path, tmp_path):
    grid = {
        "out": str(tmp_path / "out"),
        "store": str(store_path),
        "train": {"device": "cpu", "k": 80},
        "runs": [{"method": "fpo"}],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    done = finish([*"...", "compare", str(tmp_path / "grid.yaml"), "--json-logs"])
    found = [one for one in events(done.stderr) if one["event"] == "error"]
    assert "--k 80 compares more features" in found[0]["message"]
    assert "failed with exit code 2" in found[1]["message"] and len(found) == 2
