"""Who may write a folder: one process, until it ends in whatever way."""

import socket
import subprocess
import sys
import threading
import time

import pytest

from fpocli.system.errors import UserError
from fpocli.system.lock import WriterLock

HOLD = """
import sys, time
from pathlib import Path
from fpocli.system.lock import WriterLock
with WriterLock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def holder(path):
    """Another process that writes the path."""
    words = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_a_second_process_is_refused_with_the_name_of_the_first(path, holder):
    with pytest.raises(UserError, match="another process is writing") as caught, WriterLock(path):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_a_killed_process_is_reported_and_followed(path, holder, capsys):
    holder.kill()
    holder.wait()
    with WriterLock(path) as lock:
        lock.check()
    assert f"process {holder.pid} on" in capsys.readouterr().err
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"host": 1}', "\x00"])
def test_a_file_that_names_nobody_is_followed_as_well(path, text, capsys):
    path.with_name("store.lock").write_text(text)
    with WriterLock(path):
        pass
    assert "an unknown process, stopped writing" in capsys.readouterr().err


def test_a_process_whose_file_was_removed_or_replaced_writes_no_more(path):
    file = path.with_name("store.lock")
    with WriterLock(path) as lock:
        file.unlink()
        with pytest.raises(UserError, match="was removed while"):
            lock.check()
        with WriterLock(path), pytest.raises(UserError, match="was removed while"):
            lock.check()
    with WriterLock(path) as first:
        file.rename(file.with_suffix(".moved"))
        with WriterLock(path) as second:
            with pytest.raises(UserError, match="was removed while"):
                first.check()
            second.check()


def test_of_many_at_a_time_each_is_alone(path):
    """Threads with locks of their own, which let go and come again."""
    inside, most, refused = [], [], []

    def work():
        for _ in range(20):
            try:
                with WriterLock(path) as lock:
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    lock.check()
                    inside.pop()
            except UserError as error:
                refused.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) + len(refused) == 160
    assert all("another process is writing" in error for error in refused)
    assert list(path.parent.iterdir()) == []
