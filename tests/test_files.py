"""Files written whole, and folders held for one writer."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from fpocli.errors import UserError
from fpocli.files import held, replace_text

HOLD = """
import sys, time
from pathlib import Path
from fpocli.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_file_is_replaced_whole(tmp_path):
    file = tmp_path / "file"
    replace_text(file, "one")
    replace_text(file, "zwei ü")
    assert file.read_text(encoding="utf-8") == "zwei ü"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path/store."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "store")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path, holder):
    with (
        pytest.raises(UserError, match="another process is writing") as caught,
        held(tmp_path / "store"),
    ):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, capsys):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "store.lock").exists()
    with held(tmp_path / "store"):
        assert json.loads((tmp_path / "store.lock").read_text())["process"] == os.getpid()
    assert f"process {holder.pid}" in capsys.readouterr().err
    assert not (tmp_path / "store.lock").exists()


def test_a_writer_on_another_host_is_gone_when_it_stops_touching_its_lock(tmp_path):
    lock = tmp_path / "store.lock"
    about = {"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00"}
    lock.write_text(json.dumps(about))
    with (
        pytest.raises(UserError, match="process 7 on elsewhere, since 2026") as caught,
        held(tmp_path / "store"),
    ):
        pass
    assert f"delete {lock}" in caught.value.hint
    old = time.time() - 130
    os.utime(lock, (old, old))
    with held(tmp_path / "store"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path, text):
    (tmp_path / "store.lock").write_text(text)
    with held(tmp_path / "store"):
        pass
