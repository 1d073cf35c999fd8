"""Who may write a folder: one run, its processes, their claims, and those of exited processes."""

import json
import os
import signal
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
with WriterLock(Path(sys.argv[1]), sys.argv[2] or None) as writers:
    writers.claim("block-3")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def holder(path):
    """Starts another process that writes the path and has claimed block 3."""
    started = []

    def start(run=""):
        words = [sys.executable, "-c", HOLD, str(path), run]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "held\n"
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_with_the_process_of_the_first(path, holder):
    process = holder()
    with pytest.raises(UserError, match="another process is writing") as caught, WriterLock(path):
        pass
    assert f"process {process.pid} on {socket.gethostname()}, since 20" in str(caught.value)


def test_processes_of_one_run_share_and_others_may_join(path, holder):
    holder("job 1")
    for writers in (WriterLock(path, "job 1"), WriterLock(path, join=True)):
        with writers:
            assert not writers.claim("block-3")
            assert writers.holder_is_running("block-3")
            assert writers.claim("block-4")
            writers.check_claim("block-4")
    with pytest.raises(UserError, match="another process"), WriterLock(path, "job 2"):
        pass


def test_claims_of_a_killed_process_are_removed_at_the_next_start_only(path, holder, capsys):
    """Until then nobody takes its block, since what killed it could kill the others in turn."""
    process = holder("job 1")
    with WriterLock(path, "job 1") as writers:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not writers.holder_is_running("block-3")
        assert not writers.claim("block-3")
        assert writers.owner("block-3").process == process.pid
    with WriterLock(path, "job 2") as writers:
        assert writers.claim("block-3")
        assert writers.owner("block-3").process == os.getpid()
    told = capsys.readouterr().err
    assert f"process {process.pid} on" in told and ", with block-3," in told
    assert not path.with_name("store.writers").exists()


def test_claims_of_a_failed_process_stay_until_the_next_start(path):
    with WriterLock(path, "job") as other:
        with pytest.raises(ValueError), WriterLock(path, "job") as failing:
            failing.claim("block-1")
            raise ValueError
        assert not other.claim("block-1")
        assert not other.holder_is_running("block-1")
    with pytest.raises(ValueError), WriterLock(path) as alone:
        alone.claim("block-2")
        raise ValueError
    with WriterLock(path) as later:
        assert later.claim("block-1") and later.claim("block-2")


def test_a_process_on_another_host_counts_as_exited_when_its_file_is_not_touched(path):
    folder = path.with_name("store.writers")
    folder.mkdir()
    about = {"host": "elsewhere", "process": 7, "since": "2026-01-01T00:00:00+00:00", "run": "x"}
    (folder / "writer-1").write_text(json.dumps(about))
    with pytest.raises(UserError, match="process 7 on elsewhere, since 2026"), WriterLock(path):
        pass
    old = time.time() - 130
    os.utime(folder / "writer-1", (old, old))
    with WriterLock(path):
        assert not (folder / "writer-1").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\x00"])
def test_a_lock_file_without_content_counts_as_released(path, text):
    folder = path.with_name("store.writers")
    folder.mkdir()
    (folder / "writer-1").write_text(text)
    with WriterLock(path):
        pass
    assert not folder.exists()


def test_a_process_whose_claims_were_taken_over_writes_no_more(path):
    with WriterLock(path) as writers:
        assert writers.claim("block-1")
        (path.with_name("store.writers") / "block-1").unlink()
        with pytest.raises(UserError, match="another one took over its part of"):
            writers.check_claim("block-1")


def test_no_process_joins_before_overwriting_has_removed_the_store(path):
    """Otherwise one that joins would continue the store that is about to be replaced."""
    order = []

    def join():
        with WriterLock(path, join=True) as writers, writers.exclusive("tokens"):
            order.append("joined")

    with WriterLock(path, first="tokens") as writers:
        thread = threading.Thread(target=join)
        thread.start()
        time.sleep(0.3)
        with writers.exclusive("tokens"):
            order.append("begun")
        thread.join()
    assert order == ["begun", "joined"]


def test_of_many_processes_one_claims_a_name_and_all_hold_it_in_turn(path):
    """Sixteen writers at once: every block has one, and no two hold the exclusive name together."""
    taken, inside, most = [], [], []

    def work():
        with WriterLock(path, "job") as writers:
            for block in range(20):
                if writers.claim(f"block-{block}"):
                    taken.append(block)
            with writers.exclusive("tokens"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()
            barrier.wait()

    barrier = threading.Barrier(16)
    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(20))
    assert most == [1] * 16
