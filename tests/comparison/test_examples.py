"""The configurations of examples/ mean what they should; the SFT script scores what it should."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hub_cache import snapshot
from processes import Command, results, use_hub
from scripts import load_script
from transformers import AutoModelForCausalLM, AutoTokenizer

from fpocli import CompareConfig
from fpocli.comparison.compare import compare
from fpocli.comparison.grid import read_grid
from fpocli.comparison.tables import REPORTS
from fpocli.config import JUDGES
from fpocli.data.chat_templates import CHAT_TEMPLATES

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "examples/paper"
GRIDS = {
    # runs, sites of the store
    "table2": (6, 1),
    "table2-9b": (6, 1),
    "authors": (6, 1),
    "figure3": (5, 1),
    "table3": (15, 8),
    "table6": (4, 1),
    "table7": (6, 4),
}


def test_every_grid_is_tested():
    assert {path.stem for path in PAPER.glob("*.yaml")} == {*GRIDS, "small", "smollm2"}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_of_the_paper_make_one_store_and_run_on_all_gpus(name):
    grid = read_grid(str(PAPER / f"{name}.yaml"), REPORTS)
    runs, sites = GRIDS[name]
    (store,) = grid.stores
    assert len(grid.runs) == runs
    assert len(store.settings["layer"]) == sites
    assert store.settings["model"] == grid.sft.settings["output_dir"]
    assert {run.settings["lr"] for run in grid.runs if run.train} == {5e-7}
    launched = [step for step in grid.steps if step.kind != "cache"]
    assert all(step.words[:3] == ("torchrun", "--nproc-per-node", "4") for step in launched)
    # It uses all GPUs by itself.
    assert store.words == (sys.executable, "-m", "fpocli", "cache")
    baselines = [run for run in grid.runs if grid.is_baseline(run)]
    assert len(baselines) == 1


def test_the_papers_choice_is_a_row_of_table_3():
    grid = read_grid(str(PAPER / "table3.yaml"), REPORTS)
    rows = [
        (*run.settings["at"], run.settings["alpha"], run.settings["stop_gradient"])
        for run in grid.runs
    ]
    assert len(set(rows)) == 15
    assert ("layer_25.resid_post", 0.5, True) in rows


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """A hub cache with a small model under Gemma-2-2B's name, conversations and pairs in the data
    library's layout, and the judges' questions."""
    hub = tmp_path_factory.mktemp("hub")
    tiny.model_folder(
        snapshot(hub, "google/gemma-2-2b"), hidden_size=2304, num_hidden_layers=26,
        intermediate_size=8, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    tiny.model_folder(
        snapshot(hub, "google/gemma-2-9b"), hidden_size=3584, num_hidden_layers=42,
        intermediate_size=8, num_attention_heads=1, num_key_value_heads=1,
    )  # fmt: skip
    for repository, kind, place in JUDGES.values():
        file = snapshot(hub, repository, kind) / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"prompt": "why?", "uid": "1"}))
    return hub


def show_plans(grids):
    """What `fpo compare GRID --plan` prints of each grid."""
    for grid in grids:
        compare(CompareConfig(config_file=str(grid), plan=True))
        for stream in (sys.stdout, sys.stderr):
            print("=====", file=stream, flush=True)


def plans(hub, *grids):
    """That of each grid, from one process with this hub cache."""
    with contextlib.chdir(ROOT):
        process = Command(prepare=partial(use_hub, hub), main=partial(show_plans, grids))
    (done,) = results(process)
    assert done.returncode == 0, done.stderr
    printed, messages = (text.split("=====\n")[:-1] for text in (done.stdout, done.stderr))
    return list(zip(printed, messages, strict=True))


@pytest.mark.parametrize("where", ["on this machine", "to be downloaded"])
def test_every_grid_passes_its_plan_with_and_without_hub_files(where, offline, tmp_path):
    """Offline the data sets are never there, so no estimate can be made; that is said."""
    hub = offline if where == "on this machine" else tmp_path
    found = plans(hub, *(PAPER / f"{name}.yaml" for name in GRIDS))
    for (name, (runs, _)), (printed, messages) in zip(GRIDS.items(), found, strict=True):
        steps = [line for line in printed.splitlines() if line.startswith("to do")]
        untrained = name in ("table2", "table2-9b", "authors")
        assert len(steps) == 2 + 2 * runs - untrained
        asked = [line for line in printed.splitlines() if "the questions of" in line]
        assert asked and all(line.startswith(where) for line in asked)
        assert "no estimate for the SFT stage" in messages


def test_the_small_grid_passes_its_plan_with_hours_and_bytes(tmp_path, monkeypatch, capsys):
    """With tiny stand-ins for SmolLM2 and its SAEs, in the places that the grid names."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    tiny.model_folder(tmp_path / "demo/SmolLM2-135M-Instruct", "llama", num_hidden_layers=30)
    for name in ("sae-8", "sae-16", "sae"):
        tiny.sae_folder(tmp_path / "demo" / name)
    rows = compare(CompareConfig(config_file="examples/paper/small.yaml", plan=True))
    assert [row["state"] for row in rows] == ["to do"] * 15
    assert all(row["hours"] > 0 for row in rows)
    assert all(row["bytes"] > 0 for row in rows if not row["name"].startswith("eval"))
    assert capsys.readouterr().out.count("to do") == 15


def test_the_grid_of_smollm2(monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_grid(str(PAPER / "smollm2.yaml"), REPORTS)
    assert len(grid.runs) == 24 and len(grid.stores) == 1


# -- the SFT script --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sft():
    return load_script(PAPER / "sft.py")


TALK = [
    {"role": "user", "content": "the cat"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "and then?"},
    {"role": "assistant", "content": "it ran"},
]


def test_every_answer_and_its_end_are_scored_and_nothing_else(sft, material):
    """TRL scores what the template marks."""
    tokenizer = AutoTokenizer.from_pretrained(material / "model")
    tokenizer.chat_template = sft.scored_halos()
    made = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ids, mask = made["input_ids"], made["assistant_masks"]
    parts, before = [], 0
    for token, scored in zip(ids, mask, strict=True):
        if scored and not before:
            parts.append([])
        if scored:
            parts[-1].append(token)
        before = scored
    end = tokenizer.eos_token
    assert [tokenizer.decode(part) for part in parts] == [f"sat on the mat{end}", f"it ran{end}"]


def test_the_marks_change_no_text(sft, material):
    tokenizer = AutoTokenizer.from_pretrained(material / "model")
    texts = []
    for template in (CHAT_TEMPLATES["halos"], sft.scored_halos()):
        tokenizer.chat_template = template
        texts.append(tokenizer.apply_chat_template(TALK, tokenize=False))
        texts.append(
            tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True)
        )
    assert texts[:2] == texts[2:]


def test_conversations_keep_their_messages_alone(sft, tmp_path):
    file = tmp_path / "talks.jsonl"
    rows = [{"prompt": "x", "messages": TALK, "prompt_id": str(i)} for i in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sft.conversations(sft.SftData(model="m", data=str(file), limit=2))
    assert found.column_names == ["messages"] and len(found) == 2
    assert found[0]["messages"] == TALK


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [None, "zero3.json"])
def test_the_sft_script_trains_on_two_processes_and_leaves_whole_weights(
    material, tmp_path, deepspeed
):
    """Sharded by ZeRO-3, as the 9B grid runs it, as well."""
    data = tmp_path / "talks.jsonl"
    data.write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(16)))
    settings = {
        "model": str(material / "model"), "data": str(data), "output_dir": str(tmp_path / "out"),
        "use_cpu": True, "max_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0, "bf16": False,
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
    }  # fmt: skip
    if deepspeed:
        content = json.loads((PAPER / deepspeed).read_text()) | {"bf16": {"enabled": False}}
        (tmp_path / deepspeed).write_text(json.dumps(content))
        settings |= {"deepspeed": str(tmp_path / deepspeed), "optim": "rmsprop"}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = ROOT / "tests/support/without_compiler.py"
    done = subprocess.run(
        [sys.executable, *words, script, PAPER / "sft.py", "--config", tmp_path / "sft.yaml"],
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32)
    pairs = zip(trained.parameters(), before.parameters(), strict=True)
    assert all(one.shape == other.shape for one, other in pairs)
    assert not torch.equal(trained.lm_head.weight, before.lm_head.weight)
    template = AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert template == CHAT_TEMPLATES["halos"]


def for_gemma(text):
    """The small grid with the values in its comments, and without the lines that have a dash."""
    lines = []
    for line in text.splitlines():
        setting, _, other = line.partition("  # ")
        if line.startswith("#") or other.strip() == "-":
            continue
        lines.append(f"{setting.partition(':')[0]}: {other.strip()}" if other else line)
    return "\n".join(lines)


def test_the_small_grid_runs_gemma_with_the_values_in_its_comments(offline, tmp_path):
    text = for_gemma((PAPER / "small.yaml").read_text())
    assert "SmolLM2" not in text and "examples/" not in text
    file = tmp_path / "gemma.yaml"
    file.write_text(text)
    shutil.copy(PAPER / "sft.py", tmp_path)
    grid, paper = read_grid(str(file), REPORTS), read_grid(str(PAPER / "table2.yaml"), REPORTS)
    run, same = (next(r for r in g.runs if r.has({"method": "fpo"})) for g in (grid, paper))
    assert {run.settings[name] for name in ("lr", "batch_size", "warmup")} == {5e-7, 32, 150.0}
    assert run.settings.keys() == same.settings.keys()
    assert grid.sft.settings == paper.sft.settings | {"output_dir": "paper/small/sft"}
    ((printed, _),) = plans(offline, file)
    assert printed.count("to do") == 15
