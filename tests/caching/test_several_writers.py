"""Several processes that write one store: they share blocks, and none disturbs the others."""

import signal
import time

import pytest
from processes import Command, flags, results
from stores import assert_equal, cache_config, write_pairs

from fpocli import cache
from fpocli.store.reader import Store
from fpocli.system.lock import WriterLock


@pytest.fixture(scope="module")
def many(material, tmp_path_factory):
    """Pairs for 20 blocks, and the store that one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    data = str(write_pairs(folder / "pairs.jsonl", 160, seed=3))
    store = cache(cache_config(material, folder / "one.zarr", data=data, distributions="8"))
    return data, store.path


@pytest.fixture
def start(material, many, tmp_path):
    """Starts `fpo cache --join` on one store, in a process."""
    started = []

    def start(**changes):
        config = cache_config(
            material,
            tmp_path / "ref.zarr",
            **({"data": many[0], "join": True, "distributions": "8"} | changes),
        )
        started.append(Command("cache", *flags(config)))
        return started[-1]

    yield start
    for command in started:
        command.close()


@pytest.mark.parametrize("count", [2, 4])
def test_the_content_is_the_same_for_any_number_of_processes(start, many, tmp_path, count):
    commands = [start() for _ in range(count)]
    for command in commands:
        assert command.wait(120) == 0, command.printed()
    assert_equal(tmp_path / "ref.zarr", many[1])


def held_by(command, path):
    """The blocks that a process has claimed."""
    found = []
    for file in path.with_name(path.name + ".writers").glob("block-*"):
        with WriterLock(path, join=True) as writers:
            owner = writers.owner(file.name)
        if owner and owner.process == command.pid:
            found.append(int(file.name.removeprefix("block-")))
    return found


def stop_at_work(commands, path):
    """Pause one of the processes while it holds an unwritten block; returns the process and the
    block."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for command in commands:
            if held_by(command, path):
                command.kill(signal.SIGSTOP)
                store = Store.open(path)
                if held := [
                    block for block in held_by(command, path) if not store.is_scored(block)
                ]:
                    return command, held
                command.kill(signal.SIGCONT)
    raise AssertionError("none ever held a block")


def test_when_one_of_four_is_killed_the_others_finish_all_but_its_blocks(start, many, tmp_path):
    path = tmp_path / "ref.zarr"
    commands = [start() for _ in range(4)]
    lost, held = stop_at_work(commands, path)
    lost.kill(signal.SIGKILL)
    for command in set(commands) - {lost}:
        assert command.wait(120) == 2, command.printed()
        printed = command.printed()
        assert (
            f"has unscored blocks ({', '.join(map(str, held))}): they were claimed by process "
            f"{lost.pid} on" in printed
        )
        assert "Traceback" not in printed
    assert Store.open(path).unscored_blocks() == held
    again = start()
    assert again.wait(120) == 0, again.printed()
    assert f"process {lost.pid} on" in again.printed()
    assert_equal(path, many[1])


def test_a_slow_process_does_not_stop_the_others(start, many, tmp_path):
    """The others score all other blocks and wait; when it continues, all exit with 0."""
    path = tmp_path / "ref.zarr"
    commands = [start() for _ in range(3)]
    slow, held = stop_at_work(commands, path)
    deadline = time.monotonic() + 120
    while Store.open(path).unscored_blocks() != held:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert all(command.running() for command in commands)
    slow.kill(signal.SIGCONT)
    for command in commands:
        assert command.wait(120) == 0, command.printed()
    assert_equal(path, many[1])


def test_any_number_of_processes_resumes_what_any_other_number_began(start, many, tmp_path):
    """Four are killed, then two, then one completes it."""
    path = tmp_path / "ref.zarr"
    records = path / "blocks" / "digest" / "c"
    for count, done in ((4, 3), (2, 8)):
        commands = [start() for _ in range(count)]
        while not (records.is_dir() and len(list(records.iterdir())) >= done):
            time.sleep(0.01)
        for command in commands:
            command.kill(signal.SIGKILL)
            command.wait()
    assert 0 < len(Store.open(path).unscored_blocks()) < 20
    last = start(join=False)
    assert last.wait(120) == 0, last.printed()
    assert_equal(path, many[1])


def test_torchrun_starts_processes_of_one_run(material, many, tmp_path):
    """With what torchrun sets."""
    path = tmp_path / "ref.zarr"
    words = ["cache", *flags(cache_config(material, path, data=many[0], distributions="8"))]
    agent = {"TORCHELASTIC_RUN_ID": "of both", "GROUP_WORLD_SIZE": "1", "WORLD_SIZE": "2"}
    agent |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "2"}
    ranks = [agent | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    processes = results(*(Command(*words, **environment) for environment in ranks))
    assert [done.returncode for done in processes] == [0, 0], processes
    messages = "".join(done.stderr for done in processes)
    assert messages.count("is complete") == 1, "reported once"
    assert_equal(path, many[1])


def test_overwrite_and_repair_need_a_process_of_their_own(start):
    for flag in ("overwrite", "repair"):
        command = start(**{flag: True})
        assert command.wait(60) == 2
        assert "need a process of their own" in command.printed()
