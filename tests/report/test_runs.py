"""What fpo report knows of runs, against the files they left."""

import json
import re
import shutil

import numpy as np
import pytest
import yaml
from pages import NAME
from runs import read

from fpocli import DiffConfig, ReportConfig, TrainConfig, UserError, diff, report_runs
from fpocli.report.runs import describe_runs


def written(folder, lines, **settings):
    """The folder of a run with these metrics."""
    folder.mkdir(parents=True)
    about = {"cache": "gone.zarr", "method": "dpo", "out": str(folder)} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    (folder / "run.json").write_text(json.dumps({"store": "0" * 64}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def steps(count, **metrics):
    return [{"step": n + 1, "split": "train", "loss": float(n), **metrics} for n in range(count)]


def test_a_run_and_the_evaluation_of_its_reference(pages, hostile):
    shown, run = pages["runs"][1], hostile / "runs" / NAME
    assert [one["name"] for one in shown["runs"]] == ["reference", NAME]
    reference, trained = shown["runs"]
    assert reference["settings"] is None and trained["settings"]["method"] == "fpo"
    assert trained["finished"] and trained["steps"] == 4
    assert trained["evaluation"] == json.loads((run / "eval" / "eval.json").read_text())
    assert trained["store"]["pairs"] == 20
    lines = read(run)
    held_out = [line for line in lines if line["split"] == "eval"]
    assert [line["step"] for line in held_out] == [0, 2, 4]
    for name, (before, after) in shown["held_out"].items():
        assert before is None
        assert after == {"before": held_out[0][name], "after": held_out[-1][name]}
    for name, curves in shown["curves"].items():
        for curve in curves:
            own = [line for line in lines if line["split"] == curve["split"] and name in line]
            assert curve["run"] == 1
            assert curve["step"] == [line["step"] for line in own]
            assert curve["value"] == [line[name] for line in own]
    assert {"loss", "distance_chosen", "lr", "memory_gb"} <= shown["curves"].keys()
    pairs = [json.loads(line) for line in (run / "eval" / "pairs.jsonl").read_text().splitlines()]
    margins = [
        (p["logp_chosen"] - p["ref_logp_chosen"]) / p["tokens_chosen"]
        - (p["logp_rejected"] - p["ref_logp_rejected"]) / p["tokens_rejected"]
        for p in pairs
    ]
    edges = shown["reward_margins"]["edges"]
    assert shown["reward_margins"]["counts"][1] == np.histogram(margins, edges)[0].tolist()


def test_settings_that_differ(tmp_path):
    one = written(tmp_path / "one", steps(2), lr=1e-5, seed=1)
    other = written(tmp_path / "other", steps(2), lr=2e-5, seed=1, method="sft")
    shown = describe_runs([str(one), str(other)])
    assert shown["differing"] == {"method": ["dpo", "sft"], "lr": [1e-5, 2e-5]}
    assert describe_runs([str(one)])["differing"] == {}


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path):
    folders = [str(written(tmp_path / name / "run", steps(1))) for name in "ab"]
    assert [run["name"] for run in describe_runs(folders)["runs"]] == folders


def test_long_curves_are_means_of_consecutive_steps(tmp_path):
    shown = describe_runs([str(written(tmp_path / "run", steps(1200)))])
    (curve,) = shown["curves"]["loss"]
    assert curve["step"] == [3 * n + 2 for n in range(400)]
    assert curve["value"] == [3 * n + 1 for n in range(400)]


def test_a_run_that_is_going_on_is_shown_as_far_as_it_is(tmp_path):
    lines = steps(2, reward_accuracy=float("nan"), note="<b>")
    run = written(tmp_path / "run", [*lines, {"split": "train"}, 3, {"step": 9, "split": "x"}])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "spl')
    report_runs(ReportConfig(runs=[str(run)], html=str(tmp_path / "page.html")))
    shown = describe_runs([str(run)])
    assert shown["runs"][0]["steps"] == 2 and not shown["runs"][0]["finished"]
    assert shown["curves"].keys() == {"loss"}
    assert shown["held_out"] == {} and shown["evaluation"] == [] and shown["samples"] == []
    (run / "metrics.jsonl").unlink()
    report_runs(ReportConfig(runs=[str(run)], html=str(tmp_path / "page.html")))


def test_a_run_with_best_is_shown_at_the_step_of_its_final(tmp_path):
    held_out = [{"step": n, "split": "eval", "loss": value} for n, value in enumerate([3, 2, 1, 4])]
    settings = {"best": "loss", "eval_every": 1, "eval_fraction": 0.1}
    written(tmp_path / "run", [*held_out, *steps(3)], **settings)
    written(tmp_path / "last", [*held_out, *steps(3)])
    shown = describe_runs([str(tmp_path / "run"), str(tmp_path / "last")])
    assert [run["best_step"] for run in shown["runs"]] == [2, None]
    values = [{"before": 3, "after": 1}, {"before": 3, "after": 4}]
    assert shown["held_out"]["loss"] == values
    runs = [str(tmp_path / "run"), str(tmp_path / "last")]
    report_runs(ReportConfig(runs=runs, html=str(tmp_path / "page.html")))
    row = (tmp_path / "page.html").read_text().split("step of final/")[1].split("</tr>")[0]
    assert re.findall(r">(\d+)<", row) == ["2", "3"]


def test_metrics_of_any_name_have_a_chart(tmp_path):
    names = {"group.<b>tone</b>.distance_chosen": 1.5, "a new metric & more": 2.0}
    run = written(tmp_path / "run", steps(3, **names))
    page = tmp_path / "page.html"
    report_runs(ReportConfig(runs=[str(run)], html=str(page)))
    text = page.read_text()
    assert "<figcaption>&lt;b&gt;tone&lt;/b&gt;, distance chosen</figcaption>" in text
    assert "<figcaption>a new metric &amp; more</figcaption>" in text


def test_what_is_no_run_is_refused(tmp_path, hostile):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a run of fpo train nor an evaluation"):
        describe_runs([str(tmp_path / "empty")])
    with pytest.raises(UserError, match="9 runs are too many"):
        report_runs(ReportConfig(runs=["x"] * 9, html="page.html"))
    for file, damage, sentence in (
        ("eval.json", "[]", "eval.json is damaged"),
        ("eval.json", '{"model": "m", "split": "all", "pairs": 3}', "eval.json is damaged"),
        ("pairs.jsonl", '{"pair": 1}\n{', "pairs.jsonl is damaged"),
        ("prompts/samples.jsonl", "{}\n", "line 1 of .*samples.jsonl is damaged"),
        (
            "prompts/samples.jsonl",
            '{"prompt": 0, "temperature": {}, "turns": []}\n',
            "line 1 of .*samples.jsonl is damaged",
        ),
    ):
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(hostile / "reference", copy)
        (copy / file).write_text(damage)
        with pytest.raises(UserError, match=sentence):
            describe_runs([str(copy)])


def test_samples_to_other_prompts_are_not_put_side_by_side(hostile, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(hostile / "reference", other)
    about = other / "prompts" / "samples.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"prompts": "another hash"}))
    same = describe_runs([str(hostile / "reference"), str(hostile / "runs" / NAME)])["samples"]
    assert [len(group["rows"]) for group in same] == [10]
    assert all(None not in row["answers"] for row in same[0]["rows"])
    groups = describe_runs([str(other), str(hostile / "runs" / NAME)])["samples"]
    assert len(groups) == 2
    assert all(row["answers"].count(None) == 1 for group in groups for row in group["rows"])


def test_settings_of_the_page_are_those_of_training(pages):
    names = pages["runs"][1]["runs"][1]["settings"].keys()
    fields = TrainConfig.__dataclass_fields__.keys()
    assert fields - names == {"overwrite", "trust_remote_code"}


def test_changed_features_are_those_of_features_diff(pages, hostile):
    run = str(hostile / "runs" / NAME)
    (found,) = pages["runs"][1]["changed_features"]
    expected = diff(DiffConfig(runs=[run], contexts=0))
    assert found["numbers"] == [1] and found["site"] == "layer_3.resid_post"
    assert found["runs"] == expected["runs"]
    assert [row["runs"] for row in found["features"]] == [r["runs"] for r in expected["features"]]
    assert found["features"]
