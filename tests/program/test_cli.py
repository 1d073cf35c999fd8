"""The command line: what it loads, its flags, where their values come from, and its errors."""

import dataclasses
import errno
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tiny
import typer
import yaml
import zarr
from doc_commands import parse
from processes import Command, results
from stores import set_attributes
from typer.testing import CliRunner

import fpocli
from fpocli import (
    CacheConfig,
    CompareConfig,
    ContrastConfig,
    DiffConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    FindConfig,
    InspectConfig,
    ReportConfig,
    SaesConfig,
    ShowConfig,
    SteerConfig,
    TrainConfig,
    UserError,
)
from fpocli.cli.commands import app
from fpocli.config import PRESETS

HEAVY = {"torch", "zarr", "numpy", "transformers", "deepspeed", "datasets", "sae_lens", "pandas"}
COMMANDS = {
    "cache": CacheConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
    "compare": CompareConfig,
    "inspect": InspectConfig,
    "saes": SaesConfig,
    "doctor": DoctorConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "features contrast": ContrastConfig,
    "features find": FindConfig,
    "features show": ShowConfig,
    "features diff": DiffConfig,
    "features steer": SteerConfig,
}
FUNCTIONS = {name: name.removeprefix("features ") for name in COMMANDS} | {
    "eval": "evaluate",
    "report": "report_runs",
}
POSITIONAL = {
    "eval": "model",
    "compare": "config_file",
    "inspect": "store",
    "saes": "model",
    "report": "runs",
    "export": "source",
    "features contrast": "store",
    "features show": "store",
    "features diff": "runs",
}
REQUIRED = {
    "cache": "--model m --layer 1",
    "train": "--cache s",
    "eval": "m --cache s",
    "compare": "c.yaml",
    "inspect": "s",
    "saes": "m",
    "doctor": "",
    "report": "r --html p",
    "export": "r",
    "features contrast": "s",
    "features find": "--model m --layer 1 --target t",
    "features show": "s --feature 1",
    "features diff": "r",
    "features steer": "--model m --layer 1 --add 1=2 --prompt p",
}
ORDERS = [
    " ".join(order)
    for order in itertools.permutations(["--preset paper-control", "--config c.yaml", "--epochs 5"])
]
EXTRA = {"cache": ["config", "dry_run"], "train": ["config", "preset"], "eval": ["config"]}
FLAGS = {"model": "model", "layer": 2, "sae": "sae", "data": "ten.jsonl", "out": "new.zarr"}


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", ["fpocli.cli.commands", "fpocli --help", "fpocli train --help"])
def test_nothing_heavy_is_loaded(command):
    """Python's own -X importtime lists what is imported, on stderr."""
    program = [sys.executable, "-X", "importtime", "-m", *command.split()]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert done.stdout.startswith("Usage: ") == ("--help" in command)
    assert "fpocli.config" in loaded
    assert not HEAVY & loaded


def test_flags_are_the_fields():
    commands = dict(typer.main.get_command(app).commands)
    group = commands.pop("features").commands
    commands |= {f"features {name}": command for name, command in group.items()}
    assert [*commands] == [*COMMANDS]
    for name, config in COMMANDS.items():
        names = [field.name for field in dataclasses.fields(config)] + EXTRA.get(name, [])
        names += ["quiet", "json_logs"]
        words = POSITIONAL.get(name)
        flags = ["--" + name.replace("_", "-") for name in names if name != words]
        parameters = commands[name].params
        assert [parameter.name for parameter in parameters] == names
        assert [item.opts[0] for item in parameters if item.name != words] == flags
        assert all(parameter.help for parameter in parameters)


def test_help_lists_each_flag_once_under_its_heading():
    printed = run("train", "--help").stdout
    headings = [line for line in printed.splitlines() if re.fullmatch(r"[A-Z].*:", line)]
    assert headings[:2] == ["Data and models:", "Objective:"] and headings[-1] == "Options:"
    places = {name: printed.index(f"\n  --{name} ") for name in ("cache", "alpha", "lr", "out")}
    assert sorted(places, key=places.get) == ["cache", "alpha", "lr", "out"]
    for field in dataclasses.fields(TrainConfig):
        flag = "--" + field.name.replace("_", "-")
        assert len(re.findall(rf"(?m)^  {flag}[ ,]", printed + " ")) == 1, flag


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_commands_that_are_understood(name):
    end = re.split(r"\n *Examples?:\n", run(*name.split(), "--help").stdout)[-1]
    lines = end.replace("\\\n", " ").splitlines()
    examples = [shlex.split(line) for line in lines if line.strip()]
    assert examples
    for words in examples:
        assert words[: 1 + len(name.split())] == ["fpo", *name.split()]
        parse(words[1:])


def test_the_shell_completes_commands_flags_and_values_and_loads_nothing_heavy():
    """As bash asks: by the words so far, and the number of the one to complete."""
    code = "import sys; sys.argv = ['fpo']; from fpocli.__main__ import main; main()"
    for line, number, expected in [
        ("fpo tr", 1, ["train"]),
        ("fpo ca", 1, ["cache"]),
        ("fpo features st", 2, ["steer"]),
        ("fpo train --ca", 2, ["--cache"]),
        ("fpo train --eval-f", 2, ["--eval-fraction"]),
        ("fpo train --reward dpo_", 3, ["dpo_norm"]),
        ("fpo train --method tdpo", 3, ["tdpo1", "tdpo2"]),
        ("fpo train --preset paper-2", 3, ["paper-2b"]),
    ]:
        asked = {"_FPO_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(number)}
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True,
            text=True,
            env=os.environ | asked,
            check=True,
        )
        assert done.stdout.split() == expected
        loaded = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
        assert "fpocli.config" in loaded and not HEAVY & loaded


def test_every_command_can_be_quiet_or_print_json_lines():
    program = typer.main.get_command(app)
    groups = [command for command in program.commands.values() if hasattr(command, "commands")]
    commands = [*program.commands.values(), *groups[0].commands.values()]
    assert len(groups) == 1 and len(commands) > 10
    for command in commands:
        if command not in groups:
            found = {flag.name: flag.help for flag in command.params}
            assert found["quiet"] and found["json_logs"], command.name


@pytest.fixture
def resolve(monkeypatch, tmp_path):
    """Returns the config that a command line, with a YAML file `c.yaml`, passes to the function."""
    calls = []
    for function in FUNCTIONS.values():
        monkeypatch.setitem(vars(fpocli), function, calls.append)
    monkeypatch.chdir(tmp_path)

    def resolve(command, file=None):
        if file is not None:
            text = file if isinstance(file, str) else yaml.safe_dump(file)
            (tmp_path / "c.yaml").write_text(text)
        result = run(*command.split())
        assert result.exit_code == 0, result.output
        return calls.pop()

    return resolve


def test_flags(resolve):
    assert resolve("train --cache s") == TrainConfig(cache="s")
    assert resolve("inspect s --pair 3 --json") == InspectConfig(store="s", pair=3, json=True)
    two = ReportConfig(runs=["a", "b"], html="page.html")
    assert resolve("report a b --html page.html") == two
    assert resolve("compare c.yaml --plan") == CompareConfig(config_file="c.yaml", plan=True)
    sampled = EvalConfig(model="run", cache="s", generate=["p"], temperature=[0.2, 1.0])
    flags = "--generate p --temperature 0.2 --temperature 1"
    assert resolve(f"eval run --cache s {flags}") == sampled
    assert resolve("train --cache s --no-bf16") == TrainConfig(cache="s", bf16=False)
    several = CacheConfig(model="m", layer=[3, 1])
    assert resolve("cache --model m --layer 3 --layer 1") == several


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(cache="s"),
        TrainConfig(cache="s", method="simpo", sae=["a", "b"], bf16=False, device="cpu", lr=1e-3),
        EvalConfig(model="run", cache="s", split="all", temperature=[0.5]),
        CacheConfig(model="m", layer=[3]),
        CacheConfig(model="m", layer=[3, 1], site=["mlp_out", "resid_post"], limit=5, top_k="7"),
    ],
)
def test_a_saved_config_reproduces_itself(resolve, config):
    (name,) = (name for name, kind in COMMANDS.items() if kind is type(config))
    word = "run " if name == "eval" else ""
    assert resolve(f"{name} {word}--config c.yaml", dataclasses.asdict(config)) == config


def test_file_may_use_dashes_whole_numbers_and_no_list(resolve):
    numbers = TrainConfig(cache="s", batch_size=8, warmup=3.0, lr=5e-7)
    text = "cache: s\nbatch-size: 8\nwarmup: 3\nlr: 5e-7"
    assert resolve("train --config c.yaml", text) == numbers
    layer = CacheConfig(model="m", layer=[25], top_k="64")
    assert resolve("cache --config c.yaml", "model: m\nlayer: 25\ntop_k: 64") == layer


def test_flags_win_over_file(resolve):
    file = {"cache": "s", "lr": 1e-3, "epochs": 4, "bf16": True, "sae": ["a", "b"]}
    expected = TrainConfig(cache="t", lr=1e-4, epochs=4, bf16=False, sae=["c"])
    flags = "--cache t --lr 1e-4 --no-bf16 --sae c"
    assert resolve(f"train --config c.yaml {flags}", file) == expected
    assert resolve(f"train {flags} --config c.yaml", file) == expected


@pytest.mark.parametrize(
    ("flags", "reward", "constraint"),
    [
        ("--method simpo", "simpo", "none"),
        ("--reward dpo_norm", "dpo_norm", "kl"),
        ("--reward sft", "sft", "none"),
        ("--constraint features", "dpo", "features"),
        ("--reward dpo_norm --constraint features", "dpo_norm", "features"),
    ],
)
def test_a_flag_replaces_its_part_of_a_configs_method(resolve, flags, reward, constraint):
    """Whether the file has the method alone, or, as a run's config.yaml, what it is made of."""
    expected = TrainConfig(cache="s", reward=reward, constraint=constraint, beta=0.1)
    saved = dataclasses.asdict(TrainConfig(cache="s", method="tdpo2"))
    for file in (saved, {"cache": "s", "method": "tdpo2", "beta": 0.1}):
        assert resolve(f"train --config c.yaml {flags}", file) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets(resolve, name):
    expected = TrainConfig(cache="s", **PRESETS[name])
    assert resolve(f"train --cache s --preset {name}") == expected
    assert resolve("train --config c.yaml", {"cache": "s", "preset": name}) == expected


@pytest.mark.parametrize("flags", ORDERS)
def test_flags_win_over_file_and_file_over_preset(resolve, flags):
    file = {"cache": "s", "lr": 1e-3, "epochs": 4}
    expected = TrainConfig(**PRESETS["paper-control"] | file | {"epochs": 5})
    assert resolve(f"train {flags}", file) == expected
    assert resolve(f"train {flags}", file | {"preset": "paper-9b"}) == expected
    inside = flags.replace("--preset paper-control", "")
    assert resolve(f"train {inside}", file | {"preset": "paper-control"}) == expected


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("cache: s\nlearning_rate: 1", "c.yaml sets learning_rate, which is not a flag"),
        ("cache: [", "c.yaml is not valid YAML"),
        ("\xff", "c.yaml is not valid YAML"),
        ("- cache", "c.yaml must hold one flag per line, name: value"),
        ("cache: s\nbatch_size: many", "'--batch-size': Input should be a valid integer"),
        ("cache: s\nbatch_size: 2.5", "'--batch-size': Input should be a valid integer"),
        ("cache: s\nbf16: many", "'--bf16': Input should be a valid boolean"),
        ("cache: s\nlr: [1, 2]", "sets '--lr' to more than one value"),
        ("cache: s\nout: [a, b]", "'--out'"),
        ("cache: s\nzero: 4", "'--zero': Input should be less than or equal to 3"),
        ("cache: s\nmethod: ppo", "--method ppo is unknown"),
        ("cache: s\npreset: paper", "paper is not one of paper-2b, paper-9b, paper-control"),
        ("lr: 1", "Missing option '--cache'"),
    ],
)
def test_an_invalid_config_file_is_reported(tmp_path, monkeypatch, file, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_bytes(file.encode("latin-1"))
    result = run("train", "--config", "c.yaml")
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert result.stdout == ""
    if "ppo" in file:
        # A flag replaces a part of the file's method.
        result = run("train", "--config", "c.yaml", "--constraint", "none")
        assert result.exit_code == 2 and sentence in result.stderr
    assert "none.yaml cannot be read" in run("train", "--config", "none.yaml").stderr


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with everything that the commands below name, and a complete store of ten pairs."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model_folder(folder / "model")
    shutil.copytree(folder / "model", folder / "other")
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["another"])
    tokenizer.save_pretrained(folder / "other")
    tiny.sae_folder(folder / "sae")
    tiny.sae_folder(folder / "narrow", width=24)
    elsewhere = tiny.sae()
    elsewhere.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    elsewhere.save_model(folder / "elsewhere")
    pairs = [{"prompt": "a?", "chosen": f"cat {n}", "rejected": "rat" * n} for n in range(1, 11)]
    lines = [json.dumps(pair) + "\n" for pair in pairs]
    (folder / "ten.jsonl").write_text("".join(lines))
    (folder / "broken.jsonl").write_text(lines[0] + lines[1][:20])
    (folder / "short.jsonl").write_text(lines[0] + '{"prompt": "a", "chosen": "b"}')
    (folder / "equal.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}')
    (folder / "notes").mkdir()
    (folder / "notes" / "precious.txt").write_text("keep me")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run(*cache_command(out="ref.zarr", top_k=16, block=4, dtype="float32"))
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of `made` that a test may change, as the current folder."""
    folder = tmp_path / "work"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    return folder


def cache_command(**changes):
    command = ["cache"]
    for name, values in (FLAGS | changes).items():
        for value in values if isinstance(values, list) else [values]:
            command += ["--" + name.replace("_", "-"), value]
    return command


def error(*arguments):
    """The error message of a command; it must be followed by a hint."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    *_, message = result.stderr.partition("error: ")
    sentence, _, advice = message.partition("\nhint: ")
    assert advice.strip()
    return sentence.strip()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "./none"}, "the model ./none is neither a local path nor on the hub"),
        ({"layer": 4}, "layer 4 is out of range: the model has layers 0 to 3"),
        ({"layer": [2, 2], "sae": ["sae", "sae"]}, "a site is named twice"),
        ({"sae": "none.npz"}, "the SAE none.npz does not exist"),
        ({"sae": "none"}, "the SAE none is neither a file, a folder nor a sae-lens release/id"),
        ({"sae": "notes"}, "the SAE notes cannot be loaded"),
        ({"sae": []}, "no default SAE is known for model"),
        ({"sae": "narrow"}, "reads states of width 24, the model's are 32 wide"),
        (
            {"sae": "elsewhere"},
            "which is not the hook point layer_2.resid_post",
        ),
        ({"data": "none.jsonl"}, "the data file none.jsonl does not exist"),
        ({"data": "equal.jsonl"}, "no pair is left of 1 rows: 1 equal responses"),
        ({"site": "attention"}, "--site attention is unknown"),
        ({"site": ["mlp_out"] * 2}, "--site is used 2 times for 1 layers"),
        ({"top_k": 0}, "--top-k 0 is neither a positive number nor 'all'"),
        ({"top_k": "some"}, "--top-k some is neither"),
        ({"layer": [1, 2]}, "--sae is used 1 times for 2 layers"),
        ({"chat_template": "none.jinja"}, "--chat-template none.jinja is neither"),
        ({"out": "ref.zarr"}, "ref.zarr was made with other settings: "),
    ],
)
def test_cache_reports_a_mistake(work, changes, sentence):
    assert sentence in error(*cache_command(**changes))
    assert not (work / "new.zarr").exists()


@pytest.mark.parametrize(
    ("data", "reason"), [("broken.jsonl", "broken line"), ("short.jsonl", "missing field")]
)
def test_a_wrong_row_is_dropped_and_listed_or_refused(work, data, reason):
    command = cache_command(data=data, top_k=16)
    assert f"{data}, line 2: {reason}" in error(*command, "--strict")
    assert not (work / "new.zarr").exists()
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert f"1 pairs of 2 rows; dropped 1: {reason}" in result.stderr
    assert "dropped rows are listed in new.zarr.dropped.jsonl" in result.stderr
    (row,) = map(json.loads, (work / "new.zarr.dropped.jsonl").read_text().splitlines())
    assert (row["row"], row["place"], row["reason"]) == (1, f"{data}, line 2", reason)
    shown = json.loads(run("inspect", "new.zarr", "--json").stdout)
    assert shown["pairs"] == {"read": 2, "kept": 1, "dropped": {reason: 1}}


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("out", ["notes", "notes/precious.txt"])
def test_cache_does_not_touch_a_folder_that_is_not_a_store(work, out, overwrite):
    assert out in error(*cache_command(out=out), *overwrite)
    assert (work / "notes" / "precious.txt").read_text() == "keep me"
    assert [path.name for path in (work / "notes").iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("command", ["train --cache", "inspect"])
def test_an_unreadable_store_is_reported(work, command):
    command = command.split()
    assert error(*command, "none.zarr") == "none.zarr does not exist"
    assert "notes" in error(*command, "notes")
    set_attributes(Path("ref.zarr"), version="2.0")
    assert "ref.zarr is a store of version 2.0" in error(*command, "ref.zarr")
    set_attributes(Path("ref.zarr"), version="1.1")
    shutil.rmtree("ref.zarr/ref/margin")
    assert error(*command, "ref.zarr") == "ref.zarr/ref/margin/zarr.json is missing"


def test_train_needs_a_complete_store(work):
    set_attributes(Path("ref.zarr"), state="partial")
    zarr.open_array("ref.zarr/blocks/digest")[2] = 0
    assert error("train", "--cache", "ref.zarr") == "ref.zarr is partial: 2 of 3 blocks are scored"


def test_train_needs_as_many_features_as_it_compares(work):
    sentence = error("train", "--cache", "ref.zarr", "--k", 17)
    assert "--k 17 compares more features than ref.zarr has" in sentence


def test_train_needs_the_tokeniser_of_the_store(work):
    command = "train --cache ref.zarr --k 16 --model other --device cpu --no-bf16"
    message = error(*command.split())
    assert "the tokeniser of other is not the one that ref.zarr was made with" in message


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_reported(monkeypatch, name):
    def full(config):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(vars(fpocli), FUNCTIONS[name], full)
    words = f"{name} {REQUIRED[name]}".split()
    assert "cannot be written: No space left on device" in error(*words)


@pytest.mark.parametrize(
    "command", ["train --cache ref.zarr --k 16 --allow dtype --feature-weights", "compare"]
)
def test_a_missing_file_of_the_grid_is_reported(work, command):
    assert error(*command.split(), "none.yaml") == "none.yaml: No such file or directory"


def test_eval_reports_a_mistake(work):
    assert error("eval", "./none", "--cache", "ref.zarr").startswith("the model ./none is neither")
    assert "--k 50 compares more" in error("eval", "model", "--cache", "ref.zarr")
    assert error("eval", "model", "--cache", "none.zarr") == "none.zarr does not exist"
    command = "eval model --cache ref.zarr --device cpu --k 16 --generate none.json"
    assert error(*command.split()) == "the prompts none.json do not exist"


def test_version():
    assert run("--version").stdout.strip() == metadata.version("fpocli")


@pytest.mark.parametrize(
    ("kind", "settings", "sentence"),
    [
        (CacheConfig, {"model": "m", "layer": "x"}, "--layer x is not of type int"),
        (CacheConfig, {"model": "m", "data": []}, "--data has no value"),
        (CacheConfig, {"model": "m", "data": "a", "split": ["s", "t"]}, "--split is used 2 times"),
        (CacheConfig, {"model": "m", "layer": [1], "dtype": "fp16"}, "--dtype fp16 is unknown"),
        (TrainConfig, {"cache": "s", "method": "fpp"}, "--method fpp is unknown"),
        (TrainConfig, {"cache": "s", "zero": 7}, "--zero 7 is out of range"),
        (TrainConfig, {"cache": "s", "lr": -1.0}, "--lr -1.0 is out of range"),
        (TrainConfig, {"cache": "s", "allow": ["weights"]}, "--allow weights is unknown"),
        (TrainConfig, {"cache": "s", "gpus": 2, "device": "cuda:1"}, "--device cuda:1 is of one"),
    ],
)
def test_python_settings_are_checked_like_flags(kind, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        kind(**settings)


# -- what is printed -----------------------------------------------------------------------------


@pytest.mark.slow
def test_libraries_print_nothing_among_the_messages(work, monkeypatch):
    """Notices of DeepSpeed, warnings of torch, bars of transformers."""
    monkeypatch.chdir(work)
    (cached,) = results(Command(*map(str, cache_command(out="quiet.zarr"))))
    # Imports included, as are those after the weights were loaded in parts.
    words = [sys.executable, "-m", "fpocli", "train", "--cache", "ref.zarr", "--k", "16"]
    words += ["--batch-size", "8", "--no-bf16", "--out", "quiet", "--device", "cpu", "--zero", "3"]
    trained = subprocess.run(words, capture_output=True, text=True)
    for done in (cached, trained):
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        for sign in ("WARNING", "Warning", "it/s]", "DeepSpeed", "[20"):
            assert sign not in done.stderr


def test_the_completion_script_is_printed():
    # Typer looks for the shell that started the process, and `make` starts sh.
    environment = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "fpocli", "--show-completion", "bash"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and "_COMPLETE=complete_bash" in done.stdout
