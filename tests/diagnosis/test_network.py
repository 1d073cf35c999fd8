"""fpo doctor --bucket and --ray: on a real S3 server and a real cluster of this machine."""

import sys
from datetime import timedelta

import pytest
import ray
from buckets import faults, s3_server
from ray.cluster_utils import Cluster
from typer.testing import CliRunner

from fpocli.cli.commands import app
from fpocli.diagnosis import network
from fpocli.store import bucket as bucket_module
from fpocli.store.place import place_of


@pytest.fixture(scope="module")
def bucket():
    with s3_server() as url:
        yield f"{url}/stores/ref.zarr"


def test_a_bucket_passes_and_nothing_is_left_in_it(bucket):
    (check,) = network.bucket(bucket)
    assert check.verdict == "ok", check
    assert "ms a request; conditional writes are respected" in check.found
    assert not list(place_of(bucket.removesuffix("/ref.zarr")).files())


def test_a_bucket_that_disregards_conditions_fails(bucket):
    with faults(lambda *_: "unconditional"):
        (check,) = network.bucket(bucket)
    assert check.verdict == "failed" and "written over" in check.found
    assert "two processes could write one store" in check.advice
    assert not list(place_of(bucket.removesuffix("/ref.zarr")).files())


def test_a_bucket_that_cannot_be_reached_fails(bucket, monkeypatch):
    monkeypatch.setattr(
        bucket_module, "_RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}
    )
    monkeypatch.setattr(bucket_module, "_PAUSE", 0)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    (check,) = network.bucket(bucket)
    assert check.verdict == "failed" and "cannot be reached" in check.found
    assert "credentials" in check.advice


@pytest.mark.parametrize("url", ["s3://bucket", "ftp://host/name", "a/folder"])
def test_what_is_no_url_of_a_bucket_fails(url):
    (check,) = network.bucket(url)
    assert check.verdict == "failed" and "does not name a place for a store" in check.found


@pytest.fixture(scope="module")
def cluster():
    """A host with two processors, and a head on which no worker runs."""
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    hosts.add_node(num_cpus=2)
    hosts.wait_for_nodes()
    yield hosts
    ray.shutdown()
    hosts.shutdown()


def test_every_host_of_a_cluster_is_asked(cluster, monkeypatch):
    # The other checks are tested elsewhere.
    monkeypatch.setattr("fpocli.diagnosis.self_test.self_test", lambda: iter(()))
    done = CliRunner().invoke(app, ["doctor", "--ray", cluster.address])
    assert done.exit_code == 0, done.output
    assert "ok      Ray: hosts for workers: 1, GPUs: 0, CPUs: 2\n" in done.stdout
    (host,) = [line for line in done.stdout.splitlines() if line.startswith("ok      Ray, ")][:1]
    versions = ", ".join(f"{what} {version}" for what, version in network.versions().items())
    assert host.endswith(f": GPUs: 0, CPUs: 2, {versions}")


def test_a_host_with_another_version_fails(cluster, monkeypatch):
    real = network.metadata.version
    monkeypatch.setattr(
        network.metadata, "version", lambda name: "9.9" if name == "fpocli" else real(name)
    )
    total, host = network.ray(cluster.address)
    assert total.verdict == "ok" and host.verdict == "failed"
    assert host.advice == "install there what is here: fpo"


def test_a_cluster_that_cannot_be_reached_fails():
    (check,) = network.ray("127.0.0.1:1")
    assert check.verdict == "failed" and "Ray cannot be reached" in check.found


def test_missing_packages_are_named(bucket, monkeypatch):
    for package, extra in (("ray", "ray"), ("obstore", "cloud")):
        monkeypatch.setitem(sys.modules, package, None)
        (check,) = network.ray("auto") if package == "ray" else network.bucket(bucket)
        assert check.verdict == "failed" and "need" in check.found
        assert f'"fpocli[{extra}]"' in check.advice
