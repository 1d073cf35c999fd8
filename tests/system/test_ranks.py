"""Which of several processes tells an error that all of them meet."""

import threading
import time

import pytest

from fpocli.system import ranks


@pytest.fixture
def told(monkeypatch, tmp_path) -> list[str]:
    """What is told by the processes of torchrun, each with its own folder in one of the launch."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0/error.json"))
    return []


def test_rank_0_tells_and_the_others_wait_for_it(monkeypatch, told):
    """It may be late, as while it closes trackers: they would be ended if another one left."""
    monkeypatch.setenv("RANK", "1")
    waiting = threading.Thread(target=ranks.tell_once, args=("wrong", lambda: told.append("1")))
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and not told
    monkeypatch.setenv("RANK", "0")
    ranks.tell_once("wrong", lambda: told.append("0"))
    waiting.join(5)
    assert not waiting.is_alive() and told == ["0"]


def test_another_rank_tells_what_rank_0_does_not(monkeypatch, told):
    """One of them, and every error."""
    monkeypatch.setattr(ranks, "_TELLING", 0.1)
    monkeypatch.setenv("RANK", "0")
    ranks.tell_once("wrong", lambda: told.append("0"))
    for rank in "12":
        monkeypatch.setenv("RANK", rank)
        ranks.tell_once("worse", lambda rank=rank: told.append(rank))
    assert told == ["0", "1"]


def test_a_process_by_itself_tells(monkeypatch, told):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    for _ in range(2):
        ranks.tell_once("wrong", lambda: told.append("alone"))
    assert told == ["alone", "alone"]


def test_a_launcher_that_is_gone_prevents_nothing(monkeypatch, told, tmp_path):
    monkeypatch.setattr(ranks, "_TELLING", 0.1)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone/0/error.json"))
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        ranks.tell_once("wrong", lambda rank=rank: told.append(rank))
    assert told == ["0", "1"]
