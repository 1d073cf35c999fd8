"""`fpo train --gpus N`: what it starts, and when it is refused."""

import os
import sys

import pytest
import torch
from processes import Command, results
from runs import command

from fpocli import UserError
from fpocli.system.launch import launch
from fpocli.system.signals import RESUME


@pytest.fixture(autouse=True)
def started(monkeypatch) -> list[list[str]]:
    """The commands that replaced this process."""
    commands = []
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "argv", ["/bin/fpo", "train", "--gpus", "4", "--overwrite"])
    return commands


@pytest.mark.parametrize(("number", "device"), [(4, None), (4, "cuda"), (8, "cpu")])
def test_the_same_command_is_started_by_torchrun(started, number, device):
    launch(number, device)
    torchrun = [sys.executable, "-m", "fpocli.system.torchrun", str(number)]
    assert started == [[*torchrun, *sys.argv[1:]]]
    assert os.environ[RESUME] == "/bin/fpo train --gpus 4", "without --overwrite"
    # In one of the processes that were started.
    launch(number, device)
    assert len(started) == 1


def test_more_gpus_than_there_are_are_refused(started):
    with pytest.raises(UserError, match="--gpus 5 asks for more GPUs than this machine has: 4"):
        launch(5, None)
    assert not started


def test_a_launcher_within_a_launcher_is_refused(started):
    os.environ["WORLD_SIZE"] = "2"
    with pytest.raises(UserError, match="a launcher has started this one"):
        launch(2, "cpu")
    assert not started


def test_another_number_of_processes_than_gpus_is_refused(material, store_path, tmp_path):
    """Such as from Python, where nothing is started."""
    words = command(material, tmp_path / "run", "--no-bf16", gpus=2)[3:]
    (done,) = results(Command(*words, **{RESUME: "fpo"}))
    assert done.returncode == 2
    assert "gpus is 2, but the number of processes is 1" in done.stderr
