"""Caching by workers of Ray: the same content whatever is killed, added or resumed."""

import random
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import ray
from processes import Command, flags
from ray.cluster_utils import Cluster
from stores import assert_equal, cache_config, write_pairs

from fpocli import UserError, cache
from fpocli.caching.on_ray import cores_of_each
from fpocli.store.reader import Store

# A variable in the environment of the programs that a command starts.
MARK = "FPO_TEST_OF_RAY"


@pytest.fixture(scope="module")
def many(material, tmp_path_factory):
    """Pairs for 20 blocks, and the store that one process makes of them."""
    folder = tmp_path_factory.mktemp("many")
    data = str(write_pairs(folder / "pairs.jsonl", 160, seed=3))
    store = cache(cache_config(material, folder / "one.zarr", data=data, distributions="8"))
    return data, store.path


@pytest.fixture
def start(material, many, tmp_path):
    """Starts `fpo cache` on one store, in a process."""
    started = []

    def start(**changes):
        config = cache_config(
            material, tmp_path / "ref.zarr", **({"data": many[0], "distributions": "8"} | changes)
        )
        started.append(Command("cache", *flags(config), **{MARK: "1"}))
        return started[-1]

    yield start
    for command in started:
        command.close()


@pytest.fixture
def cluster():
    """Four hosts with a processor each, as far as Ray knows."""
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(4):
        hosts.add_node(num_cpus=1)
    hosts.wait_for_nodes()
    yield hosts
    ray.shutdown()
    hosts.shutdown()


def scored_blocks(path):
    records = path / "blocks" / "digest" / "c"
    return len(list(records.iterdir())) if records.is_dir() else 0


def reached(path, moment, command):
    return scored_blocks(path) >= moment or not command.running()


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def descendants(name):
    """The programs whose environment has a variable of that name."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if name.encode() + b"=" in file.read_bytes():
                found.append(file.parent.name)
    return found


@pytest.mark.slow
def test_two_workers_write_what_one_process_does(start, many, tmp_path):
    """And nothing of Ray is left."""
    command = start(workers=2)
    wait_until(lambda: len(descendants(MARK)) > 3)
    assert command.wait(300) == 0, command.printed()
    assert_equal(tmp_path / "ref.zarr", many[1])
    wait_until(lambda: not descendants(MARK))


@pytest.mark.slow
def test_what_a_killed_command_began_is_completed(start, many, tmp_path):
    """Of that, too, nothing of Ray is left."""
    path = tmp_path / "ref.zarr"
    killed = start(workers=2)
    wait_until(lambda: scored_blocks(path) >= 3)
    assert len(descendants(MARK)) > 3
    killed.kill()
    killed.wait()
    assert 0 < len(Store.open(path).unscored_blocks()) < 20
    again = start(workers=2)
    assert again.wait(300) == 0, again.printed()
    assert f"process {killed.pid} on" in again.messages()
    assert "blocks are scored" in again.messages()
    assert_equal(path, many[1])
    wait_until(lambda: not descendants(MARK))


@pytest.mark.parametrize(
    ("workers", "cores", "each"),
    [(2, [8], 4), (3, [8, 8], 4), (3, [8], 2), (5, [2], 1), (1, [8, 8], 8), (3, [0, 3, 5], 2)],
)
def test_the_cores_are_shared_out_so_that_all_workers_find_room(workers, cores, each):
    assert cores_of_each(workers, cores) == each


def test_what_is_missing_is_named(material, tmp_path, monkeypatch):
    config = cache_config(material, tmp_path / "ref.zarr", workers=2)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="need the package ray") as caught:
        cache(config)
    assert 'pip install "fpocli[ray]"' in caught.value.hint


def test_a_launcher_is_refused(material, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="starts its processes itself") as caught:
        cache(cache_config(material, tmp_path / "ref.zarr"))
    assert "--workers" in caught.value.hint


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere.invalid:6379", "127.0.0.1:x"])
def test_a_cluster_that_cannot_be_reached_is_named(material, tmp_path, address):
    with pytest.raises(UserError, match="Ray cannot be reached") as caught:
        cache(cache_config(material, tmp_path / "ref.zarr", ray=address, workers=2))
    assert "auto for the cluster of this host" in caught.value.hint


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_hosts_are_lost_at_random_moments(start, many, cluster, tmp_path):
    """Of four hosts two are killed, twenty times; each time all blocks are scored by the rest."""
    rng = random.Random(0)
    path = tmp_path / "ref.zarr"
    for _ in range(20):
        command = start(ray=cluster.address, workers=4, overwrite=True)
        for _ in range(2):
            # From before the first block to after the last but one.
            moment = rng.randrange(19)
            wait_until(partial(reached, path, moment, command))
            time.sleep(rng.random())
            victim = rng.choice(sorted(cluster.worker_nodes, key=lambda node: node.node_id))
            cluster.remove_node(victim, allow_graceful=False)
        assert command.wait(600) == 0, command.printed()
        assert_equal(path, many[1])
        # Ray's own report has twenty lines of a log.
        assert "state-dump" not in command.printed()
        cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hosts_that_join_are_used_and_a_killed_driver_goes_on(start, many, cluster, tmp_path):
    """With one host left the driver begins, and is killed; with six the same command completes."""
    path = tmp_path / "ref.zarr"
    for host in sorted(cluster.worker_nodes, key=lambda node: node.node_id)[1:]:
        cluster.remove_node(host)
    first = start(ray=cluster.address, workers=6)
    wait_until(lambda: scored_blocks(path) >= 2)
    first.kill()
    first.wait()
    second = start(ray=cluster.address, workers=6)
    wait_until(lambda: scored_blocks(path) >= 4)
    for _ in range(5):
        cluster.add_node(num_cpus=1)
    assert second.wait(600) == 0, second.printed()
    assert_equal(path, many[1])
