"""fpo compare: the grid file, a small grid from end to end, and its tables."""

import json
import shutil
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import yaml
from buckets import s3_server
from forked_launch import forked_launch
from runs import finish
from stores import attributes, set_attributes

from fpocli import CompareConfig
from fpocli.comparison.columns import TABLES
from fpocli.comparison.compare import compare
from fpocli.comparison.differences import BaselineDifferences
from fpocli.comparison.grid import read_grid
from fpocli.comparison.tables import REPORTS, make_table
from fpocli.evaluation.charts import draw_figure3
from fpocli.store.place import place_of
from fpocli.system.errors import UserError


def grid(tmp_path, **content):
    file = tmp_path / "grid.yaml"
    base = {"out": str(tmp_path / "out"), "store": "ref.zarr", "runs": [{"method": "fpo"}]}
    file.write_text(yaml.safe_dump(base | content, sort_keys=False))
    return str(file)


def read(tmp_path, **content):
    return read_grid(grid(tmp_path, **content), REPORTS)


def test_lists_are_multiplied_out(tmp_path):
    found = read(
        tmp_path,
        train={"preset": "paper-2b", "lr": 1e-4},
        runs=[{"method": ["dpo", "fpo"], "seed": [0, 1]}, {"method": "fpo", "alpha": [0.1, 2]}],
    )
    assert [run.name for run in found.runs] == [
        "method-dpo_seed-0",
        "method-dpo_seed-1",
        "method-fpo_seed-0",
        "method-fpo_seed-1",
        "method-fpo_alpha-0.1",
        "method-fpo_alpha-2",
    ]
    assert not found.stores
    settings = found.runs[4].train.settings
    assert settings["alpha"] == 0.1 and settings["warmup"] == 150 and settings["lr"] == 1e-4
    assert found.runs[0].settings["beta"] == 0.1


def test_runs_of_the_same_cache_settings_share_a_store(tmp_path):
    file = tmp_path / "grid.yaml"
    content = {
        "cache": {"model": "m", "layer": [25], "sae": ["a/canonical"]},
        "runs": [
            {"method": ["dpo", "fpo"]},
            {"method": "sft", "layer": [[25]], "site": [["resid_post"]]},
            {"method": "fpo", "sae": [["b/canonical"]]},
            {"method": "fpo", "layer": [0, 12], "sae": ["a", "b"], "site": ["mlp_out"]},
        ],
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    found = read_grid(str(file), REPORTS)
    assert [step.name.rpartition("-")[0] for step in found.stores] == [
        "cache.25.resid_post",
        "cache.25.resid_post",
        "cache.0.mlp_out+12.mlp_out",
    ]
    stores = [run.train.settings["cache"] for run in found.runs]
    assert stores[0] == stores[1] == stores[2] == found.stores[0].settings["out"]
    assert stores[3] == found.stores[1].settings["out"] != stores[0]
    assert found.runs[3].settings["sae"] == []
    assert found.runs[4].settings["layer"] == [0, 12]
    content["runs"][3]["sae"] = ["a"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="--sae is used 1 times for 2 layers"):
        read_grid(str(file), REPORTS)


def test_numbers_that_yaml_reads_as_text(tmp_path):
    """YAML 1.1 reads 2e-5 as a string, since it has no decimal point."""
    file = tmp_path / "grid.yaml"
    file.write_text("store: s\ntrain: {lr: 2e-5, warmup: 3}\nruns: [{method: fpo, alpha: [1e-1]}]")
    (run,) = read_grid(str(file), REPORTS).runs
    assert run.settings["lr"] == 2e-5 and run.settings["alpha"] == 0.1


def test_a_runs_method_replaces_that_of_train(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "store: s\ntrain: {reward: dpo, constraint: kl}\n"
        "runs: [{method: [fpo, dpo]}, {reward: dpo_norm}]"
    )
    runs = read_grid(str(file), REPORTS).runs
    assert [run.settings["method"] for run in runs] == ["fpo", "dpo", "dpo_norm+kl"]


def test_a_hub_cache_without_the_model_is_reported(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("cache: {layer: [3]}\nruns: [{method: fpo}]")
    with pytest.raises(UserError, match="lacks model"):
        read_grid(str(file), REPORTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"runs": []}, "has no `runs`"),
        ({"runs": [{"methd": "fpo"}]}, "sets methd"),
        ({"runs": [{"method": "fpp"}]}, "--method fpp is unknown"),
        ({"runs": ["fpo"]}, "not a mapping of settings"),
        ({"runs": [{"method": "fpo"}, {"method": "fpo"}]}, "has the run method-fpo twice"),
        ({"runs": [{"layer": [[7]]}]}, "but names a finished store"),
        ({"cache": {"model": "m"}}, "either `store` or `cache`"),
        ({"train": {"preset": "paper"}}, "preset paper is unknown"),
        ({"train": {"rate": 1}}, "sets rate"),
        ({"eval": {"generation": "x"}}, "sets generation"),
        ({"reports": ["table1"]}, "unknown report table1"),
        ({"seeds": 3}, "unknown section seeds"),
        ({"runs": "all"}, "runs in .* is not of type list"),
        ({"train": {"lr": "fast"}}, "--lr fast is not of type float"),
        ({"train": {"epochs": 1.5}}, "--epochs 1.5 is not of type int"),
        ({"train": {"bf16": "yes"}}, "--bf16 yes is not of type bool"),
        ({"train": {"out": "x"}}, "sets out"),
        ({"train": {"preset": ["paper-2b"]}}, "is unknown"),
        ({"train": {"measure_kl": True}}, "none are held out"),
        ({"eval": {"out": "x"}}, "sets out"),
        ({"eval": {"preset": "paper-2b"}}, "sets preset"),
        ({"eval": {"temperature": ["hot"]}}, "--temperature hot is not of type float"),
        ({"eval": {"temperature": [float("nan")]}}, "--temperature"),
        ({"eval": {"temperature": [0.7, 0.7]}}, "is repeated"),
        ({"eval": {"feature_weights": "logits"}}, "names no group"),
        ({"runs": [{"seed": "abc"}]}, "--seed abc is not of type int"),
        ({"runs": [{"cache": "x"}]}, "sets cache"),
        ({"launch": "torchrun 'x"}, "not a command line"),
        ({"launch": "torchrun -m fpocli"}, "names fpo, which fpo compare adds itself"),
        ({"sft": {"script": "s.py", "model": "m"}}, "names a model or store as well"),
        ({"sft": {"model": "m"}}, "names no script"),
        ({"sft": {"script": "s.py"}}, "names no model"),
        ({"eval": {"reference": "sft"}}, "there is no `sft`"),
        ({"baseline": "dpo"}, "no run of .* is the baseline dpo"),
        ({"runs": [{"method": "fpo", "alpha": [1, 2]}], "baseline": "fpo"}, "several runs"),
    ],
)
def test_mistakes_in_a_grid_are_reported_before_anything_runs(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **content)


def remark(out, file):
    """Mark every step as done."""
    for step in read_grid(str(file), REPORTS).steps:
        (out / "configs" / f"{step.name}.done").write_text(step.inputs())


def fpo(*words):
    return finish([sys.executable, "-m", "fpocli", *map(str, words)])


@pytest.fixture(scope="module")
def launch():
    with forked_launch() as words:
        yield words


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory, launch):
    """Two methods from one store, in their own processes."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.jsonl").write_text('{"prompt": "say the cat"}\n')
    content = {
        "out": str(folder / "out"),
        "launch": launch,
        "cache": {
            "model": str(material / "model"),
            "layer": [3],
            "sae": [str(material / "sae")],
            "data": str(material / "pairs.jsonl"),
            "dtype": "float32",
            "top_k": 64,
            "block": 8,
        },
        "train": {
            "bf16": False, "batch_size": 6, "lr": 1e-3, "warmup": 0, "eval_fraction": 0.3,
            "measure_kl": True, "eval_every": 1, "packed_length": 400,
        },
        "eval": {
            "reference": str(material / "model"), "generate": [str(folder / "prompts.jsonl")],
            "max_new_tokens": 4,
        },
        "runs": [{"method": ["simpo", "fpo"]}],
        "reports": ["all", "table2", "figure3", "figure4"],
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = fpo("compare", folder / "grid.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_tables_contain_what_eval_and_metrics_contain(finished):
    folder, done = finished
    out = folder / "out"
    frame = pd.read_csv(out / "all.csv", index_col="method")
    assert list(frame.index) == ["simpo", "fpo"]
    for method in frame.index:
        run = out / f"runs/method-{method}"
        result = json.loads((run / "eval/eval.json").read_text())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        row = frame.loc[method]
        assert row["Accuracy (%)"] == pytest.approx(100 * result["accuracy"]["share"])
        assert row["KL rejected (nats)"] == pytest.approx(result["kl"]["rejected"])
        assert row["D chosen"] == pytest.approx(result["distance"]["layer_3.resid_post"]["chosen"])
        assert row["Entropy at T = 0.7 (nats)"] == pytest.approx(result["generation"][0]["entropy"])
        seconds = [line["seconds"] for line in lines if line["split"] == "train"]
        assert row["Time (s)"] == pytest.approx(sum(seconds))
        assert "Peak (GB)" not in frame, "the reference was in memory for both"
        last = [line for line in lines if line["split"] == "eval"][-1]
        assert last["kl_chosen"] == pytest.approx(result["kl"]["chosen"], rel=1e-4)
        assert last["kl_margin"] == pytest.approx(result["kl"]["margin"], rel=1e-4)
        assert last["accuracy"] == pytest.approx(result["accuracy"]["share"])
        steps = [line["step"] for line in lines if line["split"] == "eval"]
        assert steps == [0, 1, 2, 3]
    assert (out / "table2.md").read_text() in done.stdout
    for name in ("figure3", "figure4"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["name"] for row in json.loads((out / "results.json").read_text())] == [
        "method-simpo",
        "method-fpo",
    ]


def test_finished_steps_are_not_repeated(finished):
    folder, first = finished
    final = folder / "out/runs/method-fpo/final/model.safetensors"
    before = final.stat().st_mtime_ns
    plan = fpo("compare", folder / "grid.yaml", "--plan")
    assert {line.split()[0] for line in plan.stdout.splitlines()} == {"done"}
    assert len(plan.stdout.splitlines()) == 5
    (folder / "out/runs/method-simpo/eval/eval.json").unlink()
    plan = fpo("compare", folder / "grid.yaml", "--plan")
    assert [line.split()[-1] for line in plan.stdout.splitlines() if line.startswith("to do")] == [
        "eval.method-simpo"
    ]
    again = fpo("compare", folder / "grid.yaml")
    assert again.returncode == 0, again.stderr[-2000:]
    assert final.stat().st_mtime_ns == before
    assert again.stdout == first.stdout


def test_a_grid_whose_stores_are_in_a_bucket(material, tmp_path, launch):
    """They are made there, used, named in the records, and made again if they have changed."""
    content = {
        "launch": launch,
        "cache": {
            "model": str(material / "model"), "layer": [3], "sae": [str(material / "sae")],
            "data": str(material / "pairs.jsonl"), "dtype": "float32", "top_k": 64, "block": 8,
        },
        "train": {"bf16": False, "batch_size": 8, "eval_fraction": 0.3, "packed_length": 400},
        "runs": [{"method": "fpo"}],
        "reports": ["all", "figure2"],
    }  # fmt: skip
    with s3_server() as bucket:
        file = grid(tmp_path, **content, stores=f"{bucket}/stores/")
        text = (tmp_path / "grid.yaml").read_text().replace("store: ref.zarr\n", "")
        (tmp_path / "grid.yaml").write_text(text)
        (row,) = compare(CompareConfig(config_file=file))
        url = row["settings"]["cache"]
        assert url.startswith("s3://bucket/stores/3.resid_post-") and url.endswith(".zarr")
        assert json.loads((tmp_path / "out/results.json").read_text())[0] == row
        assert (tmp_path / "out/figure2.png").is_file()
        assert {one["state"] for one in compare(CompareConfig(config_file=file, plan=True))} == {
            "done"
        }
        # The same store as one that is named, and not there any more.
        file = grid(tmp_path, store=url, train=content["train"], runs=content["runs"])
        assert read_grid(file, REPORTS).runs[0].evaluate.settings["at"] == ["layer_3.resid_post"]
        place_of(url).clear()
        (tmp_path / "grid.yaml").write_text(text)
        states = [one["state"] for one in compare(CompareConfig(config_file=file, plan=True))]
        assert states == ["to do"] * 3


def test_changes_upstream_repeat_a_step(finished, tmp_path):
    """With other prompts or another store, results of the old ones are made again."""
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "copy")
    out = tmp_path / "copy/out"
    content = yaml.safe_load((folder / "grid.yaml").read_text()) | {"out": str(out)}
    file = tmp_path / "grid.yaml"

    def plan(**changes):
        changed = {
            name: content[name] | values if isinstance(values, dict) else values
            for name, values in changes.items()
        }
        file.write_text(yaml.safe_dump(content | changed, sort_keys=False))
        lines = fpo("compare", file, "--plan").stdout.splitlines()
        return [line.split()[-1].partition(".")[0] for line in lines if line.startswith("to do")]

    # The copy lies elsewhere, so its steps count as not done until they are marked again.
    assert plan() == ["cache", "train", "eval", "train", "eval"]
    remark(out, file)
    assert plan() == []
    (tmp_path / "other.jsonl").write_text('{"prompt": "rat"}\n')
    assert plan(eval={"generate": [str(tmp_path / "other.jsonl")]}) == ["eval", "eval"]
    assert plan(train={"lr": 5e-4}) == ["train", "eval", "train", "eval"]
    assert plan(cache={"limit": 9}) == ["cache", "train", "eval", "train", "eval"]
    (store,) = (out / "stores").glob("*.zarr")
    set_attributes(store, data=attributes(store)["data"] | {"fingerprint": "made anew"})
    assert plan() == ["cache", "train", "eval", "train", "eval"]


def test_what_has_changed_is_made_again_and_what_was_interrupted_resumed(finished, tmp_path):
    folder, _ = finished
    shutil.copytree(folder / "out/stores", tmp_path / "stores")
    (store,) = (tmp_path / "stores").glob("*.zarr")
    content = yaml.safe_load((folder / "grid.yaml").read_text())
    content |= {"store": str(store), "out": str(tmp_path / "out"), "reports": []}
    content |= {"runs": [{"method": "dpo"}], "eval": {}}
    content["train"] |= {"measure_kl": False, "eval_every": None}
    del content["cache"]
    file = tmp_path / "grid.yaml"

    def run(**changes):
        changed = content | {"train": content["train"] | changes}
        file.write_text(yaml.safe_dump(changed, sort_keys=False))
        done = fpo("compare", file)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stderr

    weights = tmp_path / "out/runs/method-dpo/final/model.safetensors"
    assert "made again" not in run()
    first = weights.read_bytes()
    # As a kill leaves it: the run is begun, and its mark is missing.
    (tmp_path / "out/configs/train.method-dpo.done").unlink()
    assert "made again" not in run()
    assert weights.read_bytes() == first
    assert run(lr=5e-3).count("made again") == 2
    assert weights.read_bytes() != first


def test_a_failing_step_stops_the_comparison(finished, tmp_path):
    folder, _ = finished
    content = yaml.safe_load((folder / "grid.yaml").read_text())
    content |= {"out": str(tmp_path / "out"), "runs": [{"method": "fpo", "k": 80}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = fpo("compare", tmp_path / "grid.yaml")
    assert done.returncode == 2
    assert "--k 80 compares more features" in done.stderr
    assert "train.method-fpo_k-80 failed with exit code 2" in done.stderr


# What BaselineDifferences reads of a grid that names none.
NO_BASELINE = SimpleNamespace(file=SimpleNamespace(baseline=None), runs=[])


def row(share, **settings):
    return {
        "name": "run",
        "baseline": False,
        "verdicts": [],
        "settings": {"beta": 2.0 if settings["method"] == "simpo" else 0.1, "layer": [1], "seed": 0}
        | settings,
        "eval": {
            "accuracy": {"share": share},
            "reward_accuracy": {"share": share},
            "split": "eval",
            "pairs": 20,
        },
    }


def test_means_and_deviations_over_seeds():
    rows = [
        row(0.5, method="fpo", seed=0),
        row(0.7, method="fpo", seed=1),
        row(0.25, method="simpo", seed=0),
    ]
    text, frame = make_table(TABLES["table2"], rows, BaselineDifferences(NO_BASELINE, rows))
    assert "| fpo | 2 | 60.0 ± 14.1 | 60.0 ± 14.1 |" in text
    assert "| simpo | 1 | 25.0 | 25.0 |" in text
    assert frame["runs"].tolist() == [2, 1]
    assert frame["Accuracy (%), std"][0] == pytest.approx(14.142, abs=1e-3)
    assert "Entropy" not in text, "a column that nothing was measured for"
    assert "beta" not in text, "it differs with the method alone"
    assert "eval (20 pairs)" in text


def test_runs_of_other_settings_are_not_averaged():
    rows = [row(0.5, method="fpo", alpha=0.1), row(0.9, method="fpo", alpha=2.0)]
    text, frame = make_table(TABLES["table2"], rows, BaselineDifferences(NO_BASELINE, rows))
    assert list(frame.columns[:1]) == ["alpha"] or list(frame.columns[:2]) == ["method", "alpha"]
    assert "50.0" in text and "90.0" in text and "±" not in text.splitlines()[4]


def test_a_judges_questions_are_fetched_before_anything_runs(tmp_path, monkeypatch):
    """Not after hours of training; here there is no hub, and no questions in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    file = grid(tmp_path, eval={"generate": ["mt_bench"]})
    with pytest.raises(UserError, match="the question file of mt_bench"):
        compare(CompareConfig(config_file=file))
    assert not (tmp_path / "out").exists()


def test_the_reference_is_measured_and_not_trained(finished, material, tmp_path):
    folder, _ = finished
    (store,) = (folder / "out/stores").glob("*.zarr")
    content = {
        "store": str(store),
        "train": {"eval_fraction": 0.3},
        "runs": [{"method": "reference"}, {"method": "fpo"}],
        "baseline": "fpo",
    }
    found = read(tmp_path, **content)
    reference, trained = found.runs
    assert [step.name for step in found.steps] == [
        "eval.method-reference",
        "train.method-fpo",
        "eval.method-fpo",
    ]
    assert reference.evaluate.settings["model"] == str(material / "model")
    assert reference.evaluate.settings["eval_fraction"] == 0.3
    assert reference.evaluate.settings["at"] == trained.evaluate.settings["at"]
    assert found.baselines_of(reference) == [trained] and not found.baselines_of(trained)
    assert "alpha" not in reference.settings
    assert reference.settings["model"] == trained.settings["model"]


def test_the_pairs_of_a_second_store_are_evaluated(store_path, tmp_path):
    """Also those of the reference, all of them."""
    found = read(
        tmp_path,
        store=str(store_path),
        train={"eval_cache": "test.zarr"},
        runs=[{"method": "reference"}, {"method": "fpo"}],
    )
    for run in found.runs:
        assert run.evaluate.settings["cache"] == "test.zarr"
    assert found.runs[0].evaluate.settings["eval_fraction"] == 0
    assert found.runs[1].train.settings["cache"] == str(store_path)


def test_a_grid_needs_complete_runs(tmp_path):
    with pytest.raises(UserError, match="sets max_minutes") as error:
        read(tmp_path, train={"max_minutes": 5})
    assert "resumes" in error.value.hint


def test_figure_3_of_runs_that_ended_early(tmp_path):
    """The curve goes as far as all runs of the method do."""

    def record(last):
        names = ("step", "kl_chosen", "kl_rejected", "kl_margin")
        curve = [dict.fromkeys(names, step / 2) for step in range(last)]
        return {"curve": curve, "settings": {"beta": 0.1}, "verdicts": []}

    draw_figure3({"fpo": [record(3), record(6)]}, tmp_path / "early.png")
    draw_figure3({"fpo": [record(3), record(3)]}, tmp_path / "alike.png")
    assert (tmp_path / "early.png").read_bytes() == (tmp_path / "alike.png").read_bytes()
