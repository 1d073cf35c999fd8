"""Stores in a bucket, on a real S3 server: the same content as in a folder, one writer, damage, and
what is said about a place that does not answer."""

import itertools
import json
import random
import signal
import threading
import time
from datetime import timedelta

import numpy as np
import pytest
from buckets import FAULTS, faults, google_server, s3_server
from processes import Command, flags, results
from runs import run, same
from stores import cache_config, contents

from fpocli import EvalConfig, InspectConfig, Store, UserError, cache, evaluate, inspect
from fpocli.store import bucket as bucket_module
from fpocli.store import bucket_lock
from fpocli.store.bucket import Bucket
from fpocli.store.bucket_lock import BucketLock
from fpocli.store.metadata import write_root
from fpocli.store.place import Folder, place_of
from fpocli.store.verify import find_damage


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def in_bucket(bucket, material, tmp_path_factory):
    """A store in the bucket, with distributions, and the same one in a folder."""
    settings = {"distributions": "4", "block": 8}
    url = f"{bucket}/stores/ref.zarr"
    (done,) = results(Command("cache", *flags(cache_config(material, url, **settings))))
    assert done.returncode == 0, done.stderr
    folder = tmp_path_factory.mktemp("folder") / "ref.zarr"
    cache(cache_config(material, folder, **settings))
    return url, folder


def copy(folder, url):
    one, other = Folder(folder), place_of(url)
    for key in one.files():
        other.write(key, one.read(key))


def keys(url):
    return set(place_of(url).files())


def test_the_content_is_that_of_a_folder(in_bucket):
    url, folder = in_bucket
    place, other = place_of(url), Folder(folder)
    assert keys(url) == set(other.files())
    different = [key for key in keys(url) if place.read(key) != other.read(key)]
    # The time of making, and where files are from the store's place.
    assert different == ["zarr.json"]
    assert find_damage(Store.open(url)) == []
    assert place.read_beside(".owner.json") == ""


def test_a_run_on_it_is_that_on_a_folder(in_bucket, material, tmp_path):
    url, folder = in_bucket
    lines = [
        run(material, tmp_path / name, "--no-bf16", cache=store, method="tdpo2")
        for name, store in (("bucket", url), ("folder", folder))
    ]
    same(*lines, 0)
    found = [
        evaluate(
            EvalConfig(
                model=str(tmp_path / "bucket"), cache=str(store), out=str(tmp_path / name),
                device="cpu",
            )
        )
        for name, store in (("one", url), ("two", folder))
    ]  # fmt: skip
    assert found[0]["accuracy"] == found[1]["accuracy"]
    assert inspect(InspectConfig(store=url))["path"] == url


def test_it_is_resumed_and_repaired(in_bucket, material, bucket):
    url, folder = in_bucket
    place = place_of(url)
    config = cache_config(material, url, distributions="4", block=8)
    key = "ref/top/logp/c/0/0"
    whole = place.read(key)
    place.write(key, whole[:-3] + b"abc")
    place.delete("features/layer_3.resid_post/value/c/1/0/0")
    assert {one.block for one in find_damage(Store.open(url))} == {0, 1}
    cache(cache_config(material, url, distributions="4", block=8, repair=True))
    assert find_damage(Store.open(url)) == []
    assert place.read(key) == whole
    # As a killed process leaves it.
    place.delete("blocks/digest/c/1")
    about = json.loads(place.read("zarr.json"))["attributes"]["fpo"]
    write_root(place, about | {"state": "partial"})
    store = cache(config)
    assert store.meta["state"] == "complete"
    assert place.read("blocks/digest/c/1") == Folder(folder).read("blocks/digest/c/1")
    again = cache(cache_config(material, url, distributions="4", block=8, overwrite=True))
    assert np.array_equal(again.read_array("ref/margin"), contents(folder)["ref/margin"])


def test_one_process_at_a_time_writes(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.1)
    monkeypatch.setattr(bucket_lock, "_LOST", 1.0)
    place = Bucket(f"{bucket}/owned")
    with BucketLock(place) as first:
        with pytest.raises(UserError, match="another process is writing"), BucketLock(place):
            pass
        first.check()
    assert place.read_beside(".owner.json") == ""


def test_a_lost_owner_is_replaced_and_may_not_write_on(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.2)
    monkeypatch.setattr(bucket_lock, "_LOST", 1.0)
    place = Bucket(f"{bucket}/lost")
    paused, go_on = threading.Event(), threading.Event()
    real = place.replace_beside

    def pause(*arguments):
        paused.set()
        go_on.wait()
        return real(*arguments)

    monkeypatch.setattr(place, "replace_beside", pause)
    lost = BucketLock(place)
    lost.__enter__()
    assert paused.wait(10)
    with BucketLock(Bucket(f"{bucket}/lost")) as other:
        go_on.set()
        lost._thread.join()
        with pytest.raises(UserError, match="another one writes"):
            lost.check()
        lost.__exit__(None, None, None)
        other.check()
        assert place.read_beside(".owner.json") != "", "it is the other's"


def test_only_one_of_many_takes_over(bucket, monkeypatch):
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.2)
    monkeypatch.setattr(bucket_lock, "_LOST", 1.0)
    place = Bucket(f"{bucket}/many")
    place.write_beside(".owner.json", "{}")
    inside, outside, leave = [], [], threading.Event()

    def enter():
        try:
            with BucketLock(Bucket(f"{bucket}/many")):
                inside.append(1)
                leave.wait()
        except UserError:
            outside.append(1)
        if len(outside) == 3:
            leave.set()

    threads = [threading.Thread(target=enter) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(inside) == 1 and len(outside) == 3


@pytest.mark.slow
def test_a_stopped_process_is_no_owner_any_more(bucket, material):
    """So the same command resumes at once."""
    url = f"{bucket}/stopped.zarr"
    command = Command("cache", *flags(cache_config(material, url, block=1)))
    place = place_of(url)
    while not place.exists("blocks/digest/c/2"):
        assert command.running()
    command.kill(signal.SIGINT)
    (done,) = results(command)
    assert done.returncode == 130 and "resume from what was last saved" in done.stderr
    assert place.read_beside(".owner.json") == ""
    assert 0 < len(Store.open(url).unscored_blocks()) < 21
    (done,) = results(Command("cache", *flags(cache_config(material, url, block=1))))
    assert done.returncode == 0 and find_damage(Store.open(url)) == []


@pytest.mark.slow
def test_a_killed_process_is_waited_for_and_its_store_completed(bucket, material, monkeypatch):
    url = f"{bucket}/killed.zarr"
    config = cache_config(material, url, block=1)
    command = Command("cache", *flags(config))
    while not place_of(url).exists("blocks/digest/c/2"):
        assert command.running()
    command.close()
    assert place_of(url).read_beside(".owner.json") != ""
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.2)
    monkeypatch.setattr(bucket_lock, "_LOST", 1.0)
    assert cache(config).meta["state"] == "complete"
    assert find_damage(Store.open(url)) == []
    assert place_of(url).read_beside(".owner.json") == ""


def test_google_cloud_compares_versions(tmp_path, monkeypatch):
    """Where S3 compares e_tags."""
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.1)
    monkeypatch.setattr(bucket_lock, "_LOST", 1.0)
    with google_server(tmp_path) as url:
        place = Bucket(f"{url}/ref.zarr")
        tag = place.create_beside(".x", "one")
        assert place.create_beside(".x", "two") is None
        assert (other := place.replace_beside(".x", "two", tag)) not in (None, tag)
        assert place.replace_beside(".x", "three", tag) is None
        assert place.read_tagged_beside(".x") == ("two", other)
        with BucketLock(place) as lock:
            time.sleep(2)
            lock.check()
            with pytest.raises(UserError, match="another process is writing"):
                BucketLock(Bucket(f"{url}/ref.zarr")).__enter__()
        with BucketLock(place) as lock:
            lock.check()


def test_two_are_never_sure_that_they_own_it(bucket, monkeypatch):
    """The refreshes of the first are refused, and repeated for minutes."""
    monkeypatch.setattr(bucket_lock, "_REFRESH", 0.5)
    monkeypatch.setattr(bucket_lock, "_LOST", 3.0)
    refuse = threading.Event()

    def decide(method, path):
        return "503" if refuse.is_set() and method == "PUT" and "owner" in path else None

    direct = Bucket(f"{bucket}/two.zarr")
    with faults(decide):
        refused = Bucket(f"{bucket}/two.zarr")
        first = BucketLock(refused)
        first.__enter__()
        first.check()
        refuse.set()
        with BucketLock(direct) as second:
            second.check()
            answers = []
            thread = threading.Thread(target=lambda: answers.append(checked(first)))
            thread.start()
            thread.join(2)
            # It has been told, or is still waiting for its answer.
            assert True not in answers
            refuse.clear()
            thread.join(60)
            assert answers == [False]
            second.check()
        with pytest.raises(UserError, match="another one writes"):
            first.__exit__(None, None, None)
            first.check()


def checked(lock):
    try:
        lock.check()
    except UserError:
        return False
    return True


@pytest.mark.parametrize("left", ["all", "some", "root"])
def test_an_interrupted_overwrite_starts_over(bucket, material, monkeypatch, left):
    """By the same command, which then is one without --overwrite."""
    url = f"{bucket}/overwritten-{left}.zarr"
    cache(cache_config(material, url, block=8))

    def clear(self):
        """As if the process ended between two requests."""
        keys = [key for key in self.files() if key != "zarr.json"]
        gone = {"all": [], "some": [key for key in keys if "blocks" in key], "root": keys}[left]
        for key in gone:
            self.delete(key)
        raise UserError("stopped here")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "clear", clear)
        with pytest.raises(UserError, match="stopped here"):
            cache(cache_config(material, url, block=4, overwrite=True))
    with pytest.raises(UserError):
        Store.open(url)
    store = cache(cache_config(material, url, block=4))
    assert store.meta["state"] == "complete" and store.block_size == 4
    assert find_damage(store) == []


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://bucket", "does not name a place for a store"),
        ("ftp://bucket/ref.zarr", "does not name a place for a store"),
        ("s3:///ref.zarr", "does not name a place for a store"),
    ],
)
def test_other_urls_are_refused(url, said):
    with pytest.raises(UserError, match=said):
        Store.open(url)


def test_nothing_there_is_told_as_of_a_folder(bucket):
    with pytest.raises(UserError, match="s3://bucket/none does not exist"):
        Store.open(f"{bucket}/none")


def test_a_server_that_is_gone_is_told_in_a_sentence(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(bucket_module, "_RETRIES", {"max_retries": 0})
    monkeypatch.setattr(bucket_module, "_PAUSE", 0.05)
    with pytest.raises(UserError, match="s3://bucket/x cannot be reached") as caught:
        Store.open(f"{bucket}/x")
    assert caught.value.hint.startswith("check the network and the credentials")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_server_is_repeated_over(fault, in_bucket, material, monkeypatch):
    """Every seventh request fails; what is written and read is right all the same."""
    monkeypatch.setattr(bucket_module, "_CLIENT", bucket_module._CLIENT | {"timeout": "1s"})
    monkeypatch.setattr(bucket_module, "_PAUSE", 0.05)
    soon = {"backoff": {"init_backoff": timedelta(milliseconds=10)}}
    monkeypatch.setattr(bucket_module, "_RETRIES", bucket_module._RETRIES | soon)
    url, folder = in_bucket
    count = itertools.count()
    lock = threading.Lock()

    def decide(method, path):
        with lock:
            return fault if next(count) % 7 == 1 else None

    own = f"{url.rpartition('/')[0]}/{fault}.zarr"
    with faults(decide) as injected:
        cache(cache_config(material, own, distributions="4", block=8))
        assert len(injected) > 20
        before = len(injected)
        assert find_damage(Store.open(own)) == []
        assert len(injected) > before
    one, other = place_of(own), Folder(folder)
    assert keys(own) == set(other.files())
    assert [key for key in keys(own) if one.read(key) != other.read(key)] == ["zarr.json"]


@pytest.mark.slow
def test_a_fault_that_stays_ends_in_a_sentence(in_bucket, material, monkeypatch):
    monkeypatch.setattr(bucket_module, "_RETRIES", {"max_retries": 2})
    monkeypatch.setattr(bucket_module, "_PAUSE", 0.05)
    url, _ = in_bucket
    own = f"{url.rpartition('/')[0]}/stays.zarr"
    config = cache_config(material, own, distributions="4", block=8)
    broken = threading.Event()

    def decide(method, path):
        if method == "PUT" and "blocks/digest/c/1" in path:
            broken.set()
        return "503" if broken.is_set() else None

    with faults(decide), pytest.raises(UserError, match="cannot be reached") as caught:
        cache(config)
    assert caught.value.hint.startswith("check the network")
    assert 1 in Store.open(own).unscored_blocks()
    place_of(own).write_beside(".owner.json", "")
    assert find_damage(cache(config)) == []


@pytest.mark.parametrize("repair", [False, True])
def test_a_process_killed_at_a_request_is_completed_to_the_same_store(repair, in_bucket, material):
    """SIGKILL at some request of caching or repair; the same command ends with equal content."""
    url, folder = in_bucket
    own = f"{url.rpartition('/')[0]}/killed-{repair}.zarr"
    config = cache_config(material, own, distributions="4", block=8, repair=repair)
    if repair:
        copy(folder, own)
        for key in ("ref/top/logp/c/0/0", "features/layer_3.resid_post/value/c/1/0/0"):
            place_of(own).write(key, b"damaged")
    # Where it is killed, and whether the server still sees that request.
    requests, fault = random.randrange(100), random.choice(["cut", "lost"])
    seen, killed = itertools.count(), threading.Event()

    def decide(method, path):
        if "killed-" in path and next(seen) >= requests:
            killed.set()
            command.kill()
            return fault
        return None

    with faults(decide):
        command = Command("cache", *flags(config))
        results(command)
    assert killed.is_set(), requests
    # As a minute later.
    place_of(own).write_beside(".owner.json", "")
    assert cache(config).meta["state"] == "complete", (requests, fault)
    assert find_damage(Store.open(own)) == []
    one, other = place_of(own), Folder(folder)
    assert keys(own) == set(other.files())
    # The root's has the time when the store was created.
    assert {key for key in keys(own) if one.read(key) != other.read(key)} <= {"zarr.json"}


@pytest.mark.slow
def test_a_whole_run_over_faults(bucket, material, tmp_path):
    """Cache, verify, train, inspect and repair by the command line, while every eleventh request
    fails in one of the ways in turn."""
    url, count, lock = f"{bucket}/faulty.zarr", itertools.count(), threading.Lock()
    usual = [name for name in FAULTS if name != "hang"]

    def decide(method, path):
        with lock:
            number = next(count)
        return usual[number // 11 % len(usual)] if number % 11 == 10 else None

    def fpo(*words):
        (done,) = results(Command(*words))
        assert done.returncode == 0, done.stderr
        return done.stdout

    words = ["cache", *flags(cache_config(material, url, distributions="4", block=8))]
    with faults(decide) as injected:
        fpo(*words)
        assert "no damage" in fpo("inspect", url, "--verify")
        place_of(url).write("ref/margin/c/1", b"damaged")
        fpo(*words, "--repair")
        assert "no damage" in fpo("inspect", url, "--verify")
        lines = run(material, tmp_path / "faulty", "--no-bf16", cache=url, method="tdpo2")
    assert set(injected) == set(usual)
    same(lines, run(material, tmp_path / "sound", "--no-bf16", cache=url, method="tdpo2"), 0)
