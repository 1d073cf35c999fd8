"""kill -9 at any moment of cache and train: the same command resumes and gives the same result."""

import json
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from processes import Command, die_at, flags
from runs import MEASURED
from stores import assert_equal, cache_config, write_pairs

from fpocli import TrainConfig, cache
from fpocli.store.reader import Store
from fpocli.store.verify import find_damage

# Some of these hit while the model is loaded, most during the work.
KILLS = 3
LONG = 110


@pytest.fixture(scope="module")
def caching(material, tmp_path_factory):
    """A command that caches 12 blocks, the store of an uninterrupted run, and its duration."""
    folder = tmp_path_factory.mktemp("caching")
    data = str(write_pairs(folder / "pairs.jsonl", 96, seed=4))
    settings = {"data": data, "distributions": "8"}
    whole = cache(cache_config(material, folder / "whole.zarr", **settings)).path

    def words(out: Path) -> list[str]:
        return ["cache", *flags(cache_config(material, out, **settings))]

    end_of(words(folder / "first.zarr"))
    return words, whole, seconds_of(words(folder / "timed.zarr"))


@pytest.fixture(scope="module")
def training(material, store_path, tmp_path_factory):
    """A command that trains 10 steps, a checkpoint after each; an uninterrupted run, and its
    duration."""
    folder = tmp_path_factory.mktemp("training")

    def words(out: Path) -> list[str]:
        config = TrainConfig(
            cache=str(store_path),
            out=str(out),
            batch_size=4,
            packed_length=300,
            lr=1e-3,
            warmup=0,
            eval_fraction=0.2,
            epochs=2,
            save_every=1,
            keep_checkpoints=2,
            bf16=False,
            device="cpu",
        )
        return ["train", *flags(config)]

    end_of(words(folder / "first"))
    return words, folder / "whole", seconds_of(words(folder / "whole"))


def seconds_of(words: list[str]) -> float:
    """Seconds that an uninterrupted command takes."""
    began = time.monotonic()
    assert end_of(words) == 0
    return time.monotonic() - began


def end_of(words: list[str], **settings) -> int:
    """Run a command until it exits."""
    command = Command(*words, **settings)
    code, printed = command.wait(300), command.printed()
    command.close()
    assert code in (0, -signal.SIGKILL), printed
    return code


def same_store(one: Path, other: Path) -> None:
    assert find_damage(Store.open(one)) == []
    assert_equal(one, other)


def same_run(one: Path, other: Path) -> None:
    """Assert that the weights are bit-identical and the logs are equal, except what is measured."""
    weights = "final/model.safetensors"
    assert (one / weights).read_bytes() == (other / weights).read_bytes()
    logs = [
        [
            {name: value for name, value in json.loads(line).items() if name not in MEASURED}
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (one, other)
    ]
    assert logs[0] == logs[1]
    names = [{file.name for file in run.iterdir()} for run in (one, other)]
    assert names[0] == names[1]
    assert not one.with_name(one.name + ".writers").exists()


def kill_often(job, same, folder: Path, kills: int, seed: int) -> None:
    """Kill a command at random moments until `kills` of them have hit a running process."""
    words, whole, seconds = job
    rng, hit, ends = random.Random(seed), 0, 0
    print(f"seed {seed}")
    while hit < kills:
        out = folder / f"{ends}"
        # At most six in a row, since a run that never advances shows nothing.
        for _ in range(rng.randint(1, 6)):
            command = Command(*words(out))
            if command.wait(rng.uniform(0.1, 1.1) * seconds) is None:
                command.kill()
                hit += 1
            command.wait()
            assert "Traceback" not in command.printed()
            command.close()
        assert end_of(words(out)) == 0
        same(out, whole)
        shutil.rmtree(out)
        ends += 1
    print(f"{hit} kills, {ends} ends as if there had been none")


def die_everywhere(job, same, folder: Path, numbers) -> None:
    """Let one run die before and another after each of these changes of the file system."""
    words, whole, _ = job
    for number in numbers:
        reached = False
        for before in (True, False):
            out = folder / f"{number}{before}"
            reached |= end_of(words(out), prepare=partial(die_at, number, before)) != 0
            assert end_of(words(out)) == 0
            same(out, whole)
            if out.exists():
                shutil.rmtree(out)
        if not reached:
            print(f"{number} changes of the file system in all")
            return


@pytest.mark.slow
def test_killed_caching_ends_with_the_store_of_an_uninterrupted_one(caching, tmp_path):
    kill_often(caching, same_store, tmp_path, KILLS, seed=random.randrange(10**6))


@pytest.mark.slow
def test_killed_training_ends_with_the_weights_of_an_uninterrupted_one(training, tmp_path):
    kill_often(training, same_run, tmp_path, KILLS, seed=random.randrange(10**6))


@pytest.mark.slow
def test_caching_killed_at_a_file_operation_resumes_to_the_same_store(caching, tmp_path):
    die_everywhere(caching, same_store, tmp_path, random.sample(range(120), 2))


@pytest.mark.slow
def test_training_killed_at_a_file_operation_resumes_to_the_same_weights(training, tmp_path):
    # At change 11 the first file of a run gets its name; the other change is drawn at random.
    die_everywhere(training, same_run, tmp_path, [11, random.randrange(60)])


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_two_hundred_kills(caching, training, tmp_path):
    kill_often(caching, same_store, tmp_path / "caching", LONG, seed=random.randrange(10**6))
    kill_often(training, same_run, tmp_path / "training", LONG, seed=random.randrange(10**6))


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("job", ["caching", "training"])
def test_death_at_every_file_operation(job, request, tmp_path):
    same = {"caching": same_store, "training": same_run}[job]
    die_everywhere(request.getfixturevalue(job), same, tmp_path, range(10**4))
