"""Runs that were killed are resumed; another run in the folder is refused."""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import torch
import yaml
from processes import results, together
from runs import command, finish, finish_all, kill_at_checkpoint, read, run, same, start
from safetensors.torch import load_file

from fpocli.training import checkpoints, run_folder
from fpocli.training.run_folder import read_run


def test_a_killed_run_resumes_with_the_same_command(baseline, material, tmp_path):
    """SIGKILL after a checkpoint: the curve and the weights are those of an uninterrupted run."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", save_every=2)
    kill_at_checkpoint(words, out)
    stale = {"step": 99, "split": "train", "loss": 0}
    with (out / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps(stale) + "\n" + '{"step": 3, "spl')
    same(run(material, out, "--no-bf16", save_every=2), read(baseline), 1e-6)
    one, other = (load_file(folder / "final/model.safetensors") for folder in (out, baseline))
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_another_run_in_the_folder_is_refused(baseline, material, tmp_path):
    out = shutil.copytree(baseline, tmp_path / "run")
    shutil.rmtree(out / "final")
    first, second = finish_all(command(material, out, "--no-bf16", lr=2e-3), 2)
    assert first.returncode == second.returncode == 2
    sentence = f"error: {out} holds a run with other settings: lr is 0.001 there, 0.002 here"
    assert sentence in first.stderr
    assert "error: " not in second.stderr, "reported once, not by every process"


def test_a_second_run_in_the_folder_is_refused_while_the_first_runs(material, store_path, tmp_path):
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", epochs=50)
    first = start(words)
    try:
        first.until((out / "metrics.jsonl").is_file)
        for flags in ((), ("--overwrite",)):
            again = command(material, out, "--no-bf16", *flags, epochs=50)
            done = finish(again)
            assert done.returncode == 2
            assert f"another process is writing {out}: process {first.pid}" in done.stderr
    finally:
        first.close()


def test_the_requested_number_of_checkpoints_is_kept(material, store_path, tmp_path):
    out = tmp_path / "run"
    run(material, out, "--no-bf16", save_every=1, keep_checkpoints=2)
    names = sorted(path.name for path in (out / "checkpoints").glob("*-*"))
    assert names == ["step-3", "step-4"]


def test_an_incomplete_checkpoint_is_not_used(baseline, material, tmp_path):
    """The checkpoint before it is used."""
    out = tmp_path / "run"
    run(material, out, "--no-bf16", save_every=1, keep_checkpoints=3)
    shutil.rmtree(out / "final")
    last = out / "checkpoints/step-4"
    last.rename(out / "checkpoints/partial-4")
    lines = run(material, out, "--no-bf16", save_every=1, keep_checkpoints=3)
    same(lines, read(baseline), 1e-6)
    assert not (out / "checkpoints/partial-4").exists()


def test_the_settings_of_an_earlier_version_are_read(baseline, material, tmp_path):
    """Version 0.1 called packed_length tokens_per_row, and had fewer settings."""
    out = tmp_path / "run"
    run(material, out, "--no-bf16", save_every=2)
    shutil.rmtree(out / "final")
    about = json.loads((out / "run.json").read_text())
    about["tokens_per_row"] = about.pop("packed_length")
    del about["measure_kl"], about["at"]
    (out / "run.json").write_text(json.dumps(about))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["tokens_per_row"] = config.pop("packed_length")
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    assert read_run(out)[1].packed_length == 300
    lines = run(material, out, "--no-bf16", save_every=2)
    same(lines, read(baseline), 1e-6)
    about["lr"] = 2e-3
    (out / "run.json").write_text(json.dumps(about))
    shutil.rmtree(out / "final")
    done = finish(command(material, out, "--no-bf16", save_every=2))
    assert "lr is 0.002 there, 0.001 here" in done.stderr


def test_a_run_without_its_lock_saves_nothing_more(material, store_path, tmp_path):
    out = tmp_path / "run"
    process = start(command(material, out, "--no-bf16", epochs=40, save_every=1))
    while not (out / "checkpoints/step-2").exists():
        assert process.running()
        time.sleep(0.002)
    (tmp_path / "run.lock").unlink()
    (done,) = results(process)
    assert done.returncode == 2
    assert "was removed while this process was writing" in done.stderr
    assert not (out / "final").exists()


def list_late() -> None:
    """In this process, as NFS may: a folder is listed without its newest checkpoint."""
    listed = checkpoints._checkpoints
    checkpoints._checkpoints = lambda folder: listed(folder)[:-1]


def test_all_ranks_resume_from_one_checkpoint(material, store_path, tmp_path):
    """That of rank 0, though rank 1 does not see it yet."""
    out = tmp_path / "run"
    words = command(material, out, "--no-bf16", epochs=2, save_every=2, keep_checkpoints=3)
    finish_all(words, 2)
    whole = read(out)
    shutil.rmtree(out / "final")
    for done in results(*together(words[3:], 2, [None, list_late])):
        assert done.returncode == 0, done.stderr
    same(read(out), whole, 1e-6)


def in_folder(path: Path) -> None:
    """Let this process be on a host with a disk of its own."""
    path.mkdir()
    os.chdir(path)
    run_folder._LATE = 0.5


def test_a_folder_that_hosts_do_not_share_is_refused(material, store_path, tmp_path):
    """The checkpoints would lack the parts of all other hosts."""
    words = command(material, "run", "--no-bf16")[3:]
    hosts = [partial(in_folder, tmp_path / name) for name in ("one", "other")]
    ended = results(*together(words, 2, hosts))
    assert {done.returncode for done in ended} == {2}
    said = "".join(done.stderr for done in ended)
    assert said.count("error: ") == 1 and "is not the folder of rank 0" in said
