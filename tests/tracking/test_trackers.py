"""Trackers get every line of metrics.jsonl once, also of a run that was killed and resumed.

Each is read by its own library, offline. W&B has no reader of its own files in Python, so they are
taken apart here: LevelDB's log format, with W&B's own protobuf messages.
"""

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
from processes import results, together
from runs import command, read, start

from fpocli.tracking import trackers
from fpocli.tracking.mlflow import MLflow

ALL = ["tensorboard", "wandb", "mlflow", "trackio"]
FLAGS = [word for name in ALL for word in ("--track", name)]
STEPS = {"train": [1, 2, 3, 4, 5], "eval": [0, 2, 4, 5]}


def places(folder: Path) -> dict[str, str]:
    """The environment in which every client writes to a folder."""
    return {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": (folder / "mlruns").as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HOME": str(folder),
    }


def fpo(words: list[str], folder: Path, **settings) -> str:
    """Run a command that succeeds; its messages."""
    (done,) = results(start(words, **places(folder) | settings))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def tracked(material, store_path, tmp_path_factory) -> Path:
    """A run in three commands, the last of which repeats a step; and its evaluation."""
    folder = tmp_path_factory.mktemp("tracked")
    settings = {"save_every": 2, "keep_checkpoints": 9, "eval_every": 2}
    words = command(material, folder / "run", "--no-bf16", *FLAGS, **settings)
    fpo([*words, "--max-minutes", "0"], folder)
    fpo(words, folder)
    shutil.rmtree(folder / "run/final")
    shutil.rmtree(folder / "run/checkpoints/step-4")
    printed = fpo([*words, "--quiet"], folder)
    assert printed == ""
    (folder / "asked.jsonl").write_text('{"prompt": "the cat"}\n{"prompt": "a | hat"}\n')
    words = [sys.executable, "-m", "fpocli", "eval", str(folder / "run"), "--device", "cpu"]
    words += ["--cache", str(store_path), "--generate", str(folder / "asked.jsonl"), *FLAGS]
    fpo([*words, "--max-new-tokens", "4"], folder)
    return folder


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Every metric of metrics.jsonl by its name in the trackers, by step."""
    found: dict[str, dict[int, float]] = {}
    for line in read(folder / "run"):
        step, split = line.pop("step"), line.pop("split")
        for name, value in line.items():
            found.setdefault(f"{split}/{name}", {})[step] = value
    return found


def check(curves: dict[str, list[tuple[int, float]]], folder: Path, tolerance: float = 0) -> None:
    """Each metric has each step once. Values of the steps that were repeated are those of the
    first time, so times and memory differ."""
    known = expected(folder)
    measured = ("seconds", "tokens_per_second", "data_wait", "memory_gb", "peak_memory_gb")
    assert known.keys() == {name for name in curves if name.startswith(("train/", "eval/"))}
    for name, values in known.items():
        steps = STEPS[name.partition("/")[0]]
        assert [step for step, _ in curves[name]] == steps, name
        if not name.endswith(measured):
            got = [value for _, value in curves[name]]
            assert got == pytest.approx([values[step] for step in steps], rel=tolerance), name


def evaluation(folder: Path) -> dict[str, float]:
    """Two of the numbers of eval.json, by their names in the trackers."""
    result = json.loads((folder / "run/eval/eval.json").read_text())
    return {
        "evaluation/reward_accuracy/share": result["reward_accuracy"]["share"],
        "evaluation/generation/asked-t0.7/entropy": result["generation"][0]["entropy"],
    }


def answers(folder: Path) -> list[str]:
    file = folder / "run/eval/asked/samples.jsonl"
    return [json.loads(line)["turns"][0]["text"] for line in file.read_text().splitlines()]


def pixels(file: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(file).convert("RGB"))


def test_tensorboard(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tracked / "run/tensorboard"))
    events.Reload()
    tags = events.Tags()
    curves = {name: [(e.step, e.value) for e in events.Scalars(name)] for name in tags["scalars"]}
    check(curves, tracked, 1e-6)
    for name, value in evaluation(tracked).items():
        assert curves[name] == [(5, pytest.approx(value))]
    (image,) = events.Images("evaluation/reward_margin")
    (tracked / "read.png").write_bytes(image.encoded_image_string)
    chart = tracked / "run/eval/reward_margin.png"
    assert np.array_equal(pixels(tracked / "read.png"), pixels(chart))
    (event,) = events.Tensors("evaluation/samples.asked/text_summary")
    text = make_ndarray(event.tensor_proto)[0].decode()
    assert "| a \\| hat | 0.7 |" in text and len(text.splitlines()) == 4
    (event,) = events.Tensors("settings/text_summary")
    assert "lr: 0.001" in make_ndarray(event.tensor_proto)[0].decode()


def records(file: Path) -> Iterator:
    """The records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        body += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(body)
            body = b""


def test_wandb(tracked):
    runs, history, summary = [], [], {}
    for file in sorted(tracked.glob("run/wandb/offline-run-*/*.wandb")):
        for record in records(file):
            items = {
                "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in (*record.history.item, *record.summary.update)
            }
            if record.WhichOneof("record_type") == "run":
                runs.append(record.run)
            elif record.WhichOneof("record_type") == "history":
                history.append(items)
            else:
                summary |= items
    assert len(runs) == 4 and len({one.run_id for one in runs}) == 1
    assert (runs[0].project, runs[0].display_name) == ("fpo", "run")
    settings = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert settings["lr"] == 1e-3
    curves: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            curves.setdefault(name, []).append((row["step"], value))
    check(curves, tracked)
    for name, value in evaluation(tracked).items():
        assert summary[name] == value
    ((step, image),) = curves["evaluation/reward_margin/path"]
    assert step == 5
    (copy,) = tracked.glob(f"run/wandb/offline-run-*/files/{image}")
    chart = tracked / "run/eval/reward_margin.png"
    assert copy.read_bytes() == chart.read_bytes()
    ((_, table),) = curves["evaluation/samples.asked/path"]
    (copy,) = tracked.glob(f"run/wandb/offline-run-*/files/{table}")
    assert [row[2] for row in json.loads(copy.read_text())["data"]] == answers(tracked)


def test_mlflow(tracked, monkeypatch):
    for name, value in places(tracked).items():
        monkeypatch.setenv(name, value)
    from mlflow import MlflowClient

    client = MlflowClient(places(tracked)["MLFLOW_TRACKING_URI"])
    (experiment,) = client.search_experiments(filter_string="name = 'fpo'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["lr"] == "0.001"
    curves = {}
    for name in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, name)
        curves[name] = [(point.step, point.value) for point in points]
    check(curves, tracked)
    for name, value in evaluation(tracked).items():
        assert curves[name] == [(5, value)]
    folder = Path(client.download_artifacts(run.info.run_id, "evaluation"))
    chart = tracked / "run/eval/reward_margin.png"
    assert (folder / chart.name).read_bytes() == chart.read_bytes()
    table = json.loads((folder / "samples.asked.json").read_text())
    assert [row[table["columns"].index("answer")] for row in table["data"]] == answers(tracked)


def test_trackio(tracked, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", places(tracked)["TRACKIO_DIR"])
    import trackio

    (run,) = trackio.Api().runs("fpo")
    name = json.loads((tracked / "run/tracking.json").read_text())["trackio"]["run"]
    assert run.name == name and name.startswith("run-")
    from trackio.sqlite_storage import SQLiteStorage

    curves: dict[str, list[tuple[int, float]]] = {}
    for row in SQLiteStorage.get_logs("fpo", name):
        for metric, value in row.items():
            curves.setdefault(metric, []).append((row["step"], value))
    check(curves, tracked)
    for metric, value in evaluation(tracked).items():
        assert curves[metric] == [(5, value)]
    ((_, table),) = curves["evaluation/samples.asked"]
    assert [row["answer"] for row in table["_value"]] == answers(tracked)
    assert curves["evaluation/reward_margin"][0][1]["_type"] == "trackio.image"


def test_changed_features_are_those_of_features_diff(tracked, store_path):
    """The table that is sent, against the command that compares all features."""
    words = ["features", "diff", str(tracked / "run"), "--top", "5", "--json"]
    (done,) = results(start([sys.executable, "-m", "fpocli", *words]))
    mean = {row["feature"]: row["runs"][0] for row in json.loads(done.stdout)["features"]}
    (file,) = tracked.glob("run/wandb/offline-run-*/files/media/table/evaluation/features.*.json")
    table = json.loads(file.read_text())
    rows = {row[0]: dict(zip(table["columns"], row, strict=True)) for row in table["data"]}
    assert mean.keys() <= rows.keys()
    for feature, known in mean.items():
        assert rows[feature]["change"] == pytest.approx(known["mean"])
        assert rows[feature]["before"] == pytest.approx(known["before"])


def test_rank_0_alone_sends(material, store_path, tmp_path):
    """And a tracker that was not there from the beginning gets the earlier steps as well."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = command(material, tmp_path / "run", "--no-bf16")
    for flags in (["--max-minutes", "0"], ["--track", "tensorboard"]):
        for done in results(*together([*words[3:], *flags], 2)):
            assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run/tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == STEPS["train"]


def lose_the_server() -> None:
    """Let what MLflow writes to disappear before its third line."""
    log, lines = MLflow.log, []

    def later(tracker, numbers, step):
        lines.append(step)
        if len(lines) == 3:
            shutil.rmtree(Path.home() / "mlruns")
        log(tracker, numbers, step)

    MLflow.log = later


def test_a_tracker_that_fails_does_not_end_the_training(material, store_path, tmp_path):
    """One warning, and all steps."""
    words = command(material, tmp_path / "run", "--no-bf16", "--track", "mlflow")
    printed = fpo(words, tmp_path, prepare=lose_the_server)
    assert printed.count("mlflow failed and gets nothing more from this command") == 1
    assert [line["step"] for line in read(tmp_path / "run")] == [0, 1, 2, 3, 4, 5, 5]


def not_installed() -> None:
    """Let this process have no Trackio."""
    sys.modules["trackio"] = None


@pytest.mark.parametrize(
    ("name", "changes", "sentence", "hint"),
    [
        ("wandb", {"WANDB_MODE": "online"}, "wandb is not logged in", "wandb login"),
        ("trackio", {"prepare": not_installed}, "is not installed", "fpocli[trackio]"),
        ("mlflow", {"MLFLOW_TRACKING_URI": "nowhere://x"}, "mlflow cannot start", "--track mlflow"),
    ],
)
def test_a_tracker_that_cannot_start(material, store_path, tmp_path, name, changes, sentence, hint):
    """It is said before a model is loaded."""
    words = command(material, tmp_path / "run", "--no-bf16", "--track", name)
    (done,) = results(start(words, **places(tmp_path) | changes))
    assert done.returncode == 2 and done.stdout == ""
    assert sentence in done.stderr and hint in done.stderr
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_run_that_had_not_begun_is_another_one(material, store_path, tmp_path):
    """Its models did not load; then its settings may be others, and trackers begin anew."""
    words = command(material, tmp_path / "run", "--no-bf16", "--track", "trackio", *FLAGS[:2])
    other = tiny.sae_folder(tmp_path / "sae", seed=5)
    failing = [*words, "--lr", "1", "--sae", str(other)]
    (done,) = results(start(failing, **places(tmp_path)))
    assert done.returncode == 2 and "SAE" in done.stderr
    assert (tmp_path / "run/tracking.json").is_file()
    fpo(words, tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    (*_, event) = events.Tensors("settings/text_summary")
    assert "lr: 0.001" in make_ndarray(event.tensor_proto)[0].decode()


def test_a_model_that_is_no_run_has_no_trackers(material, store_path, tmp_path):
    words = ["eval", str(material / "model"), "--cache", str(store_path), "--device", "cpu"]
    words = [sys.executable, "-m", "fpocli", *words, "--track", "tensorboard"]
    (done,) = results(start(words))
    assert done.returncode == 2 and "continues the trackers of a run of fpo train" in done.stderr


def test_every_tracker_of_the_flag_is_there():
    from fpocli.config.shared import TRACKERS

    assert list(TRACKERS) == list(trackers._KINDS) == ALL
