"""fpo compare: what a grid means, a small one run from end to end, and its tables."""

import json
import subprocess
import sys

import pandas as pd
import pytest
import yaml

from fpocli.errors import UserError
from fpocli.grid import read_grid
from fpocli.tables import REPORTS, TABLES, make_table


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


def test_runs_of_the_same_sites_share_a_store(tmp_path):
    file = tmp_path / "grid.yaml"
    content = {
        "cache": {"model": "m", "layer": [25], "sae": ["a"]},
        "runs": [
            {"method": ["dpo", "fpo"]},
            {"method": "fpo", "layer": [[7]], "site": [["mlp_out"], ["resid_post"]]},
            {"method": "fpo", "layer": [0, 12], "sae": ["a", "b"]},
        ],
    }
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    found = read_grid(str(file), REPORTS)
    assert [step.name for step in found.stores] == [
        "cache.ref",
        "cache.layer-7_site-mlp_out",
        "cache.layer-7_site-resid_post",
        "cache.layer-0+12_sae-a+b",
    ]
    first, second, third, _, last = found.runs
    assert first.train.settings["cache"] == second.train.settings["cache"]
    assert third.train.settings["cache"] == found.stores[1].settings["out"]
    assert last.settings["layer"] == [0, 12]
    content["runs"][2]["sae"] = ["a"]
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match="1 SAEs are given for 2 layers"):
        read_grid(str(file), REPORTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"runs": []}, "has no `runs`"),
        ({"runs": [{"methd": "fpo"}]}, "sets methd"),
        ({"runs": [{"method": "fpp"}]}, "--method fpp is unknown"),
        ({"runs": ["fpo"]}, "no set of flags"),
        ({"runs": [{"method": "fpo"}, {"method": "fpo"}]}, "means the run method-fpo twice"),
        ({"runs": [{"layer": [[7]]}]}, "the store has settled"),
        ({"cache": {"model": "m"}}, "either `store` or `cache`"),
        ({"train": {"preset": "paper"}}, "preset paper is not known"),
        ({"train": {"rate": 1}}, "sets rate"),
        ({"eval": {"generation": "x"}}, "sets generation"),
        ({"reports": ["table1"]}, "table1, which is not known"),
        ({"seeds": 3}, "a section seeds"),
        ({"runs": "all"}, "runs in .* is no list"),
    ],
)
def test_what_is_wrong_is_told_before_anything_runs(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, **content)


def fpo(*words, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "fpocli", *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


@pytest.fixture(scope="module")
def finished(material, tmp_path_factory):
    """Two methods from one store, in their own processes."""
    folder = tmp_path_factory.mktemp("compare")
    (folder / "prompts.jsonl").write_text('{"prompt": "say the cat"}\n')
    content = {
        "out": str(folder / "out"),
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
            "measure_kl": True, "eval_every": 1, "tokens_per_row": 400,
        },
        "eval": {
            "reference": str(material / "model"), "generate": str(folder / "prompts.jsonl"),
            "max_new_tokens": 4,
        },
        "runs": [{"method": ["simpo", "fpo"]}],
        "reports": ["all", "table2", "figure3", "figure4"],
    }  # fmt: skip
    (folder / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = fpo("compare", folder / "grid.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def test_tables_hold_what_eval_and_metrics_say(finished):
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
        assert row["Entropy (nats)"] == pytest.approx(result["generation"][0]["entropy"])
        peaks = [line["peak_memory_gb"] for line in lines if line["split"] == "train"]
        assert row["Peak (GB)"] == pytest.approx(max(peaks))
        last = [line for line in lines if line["split"] == "eval"][-1]
        assert last["kl_chosen"] == pytest.approx(result["kl"]["chosen"], rel=1e-4)
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


def test_what_is_done_is_not_done_anew(finished):
    folder, first = finished
    final = folder / "out/runs/method-fpo/final/model.safetensors"
    before = final.stat().st_mtime_ns
    plan = fpo("compare", folder / "grid.yaml", "--plan")
    assert {line.split()[0] for line in plan.stdout.splitlines()} == {"done"}
    assert len(plan.stdout.splitlines()) == 5
    (folder / "out/runs/method-simpo/eval/eval.json").unlink()
    plan = fpo("compare", folder / "grid.yaml", "--plan")
    assert "to do  eval.method-simpo" in plan.stdout
    again = fpo("compare", folder / "grid.yaml")
    assert again.returncode == 0, again.stderr[-2000:]
    assert final.stat().st_mtime_ns == before
    assert again.stdout == first.stdout


def test_a_step_that_fails_stops_the_comparison(finished, tmp_path):
    folder, _ = finished
    content = yaml.safe_load((folder / "grid.yaml").read_text())
    content |= {"out": str(tmp_path / "out"), "runs": [{"method": "fpo", "k": 80}]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    done = fpo("compare", tmp_path / "grid.yaml")
    assert done.returncode == 2
    assert "--k 80 compares more features" in done.stderr
    assert "train.method-fpo_k-80 stopped with exit code 2" in done.stderr


def test_means_and_deviations_over_seeds():
    def row(method, seed, share):
        return {
            "settings": {"method": method, "seed": seed, "layer": [1]},
            "eval": {"accuracy": {"share": share}},
        }

    rows = [row("fpo", 0, 0.5), row("fpo", 1, 0.7), row("dpo", 0, 0.25)]
    text, frame = make_table(TABLES["table2"], rows)
    assert "| fpo | 60.0 ± 14.1 |" in text and "| dpo | 25.0 |" in text
    assert frame["seeds"].tolist() == [2, 1]
    assert frame["Accuracy (%), std"][0] == pytest.approx(14.142, abs=1e-3)
    assert "Entropy" not in text, "a column that nothing was measured for"
