"""What this machine reaches: the hub, a bucket, a cluster of Ray."""

import secrets
import time
from collections.abc import Iterator
from importlib import metadata
from platform import python_version
from typing import Any
from urllib.parse import urlsplit

from fpocli.diagnosis.check import Check
from fpocli.store.bucket import Bucket
from fpocli.system.console import progress
from fpocli.system.errors import UserError
from fpocli.system.ray_connection import connected_ray

_TIMEOUT = 3.0  # seconds that the hub has for its answer
_PATIENCE = 120.0  # seconds in which every host of a cluster imports fpo


def hub() -> Iterator[Check]:
    """Whether the Hugging Face hub answers, and whether there is a token for it."""
    from huggingface_hub import constants, get_session, get_token
    from huggingface_hub.errors import HTTPError

    token = "a token is set" if get_token() else "no token"
    # The address may hold a password.
    host = urlsplit(constants.ENDPOINT).hostname
    local = "only local files and the hub's cache can be used; for downloads "
    if constants.HF_HUB_OFFLINE:
        yield Check("hub", "note", f"HF_HUB_OFFLINE is set, {token}", f"{local}unset it")
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except (HTTPError, OSError) as error:
        found = f"{host} cannot be reached ({error}), {token}"
        yield Check("hub", "note", found, f"{local}check the network and HF_ENDPOINT")
        return
    if get_token():
        yield Check("hub", "ok", f"{host} answers, {token}")
    else:
        advice = "Gemma and other gated models need `hf auth login`"
        yield Check("hub", "note", f"{host} answers, {token}", advice)


def bucket(url: str) -> Iterator[Check]:
    """Whether a store can be written at a URL: a file beside it is written, read and deleted, and
    one that is there already is not written again, on which the store's lock depends.

    Args:
        url: such as s3://bucket/ref.zarr.
    """
    name = f"bucket {url}"
    try:
        with progress(f"Asking {url}", None):
            bucket = Bucket(url)
            suffix, text = f".doctor-{secrets.token_hex(4)}", secrets.token_hex(8)
            began = time.perf_counter()
            first = bucket.create_beside(suffix, "this process")
            try:
                second = bucket.create_beside(suffix, "another process")
                last = first and bucket.replace_beside(suffix, text, first)
                stale = first and bucket.replace_beside(suffix, "another process", first)
                read = bucket.read_tagged_beside(suffix)
            finally:
                bucket.write_beside(suffix, "")
            took = time.perf_counter() - began
            gone = bucket.read_tagged_beside(suffix) is None
    except UserError as error:
        yield Check(name, "failed", str(error), error.hint)
        return
    if second or stale or read != (text, last):
        advice = "two processes could write one store: use a bucket with conditional writes"
        yield Check(name, "failed", "a file that was there was written over", advice)
    elif not gone:
        yield Check(name, "failed", "a file is still there after it was deleted", "allow it")
    else:
        # Eight requests, as writes that were refused read the file once more.
        found = f"written, read and deleted; {took / 8 * 1e3:.0f} ms a request"
        yield Check(name, "ok", f"{found}; conditional writes are respected")


def ray(address: str) -> Iterator[Check]:
    """Whether a cluster is reached, and every host has the versions of this one.

    Args:
        address: of its head, or auto.
    """
    try:
        with progress("Asking the cluster", None), connected_ray(address) as ray:
            checks = list(_hosts(ray))
    except UserError as error:
        checks = [Check("Ray", "failed", str(error), error.hint)]
    yield from checks


def _hosts(ray: Any) -> Iterator[Check]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the head of a cluster without CPUs no worker runs.
    hosts = [h for h in ray.nodes() if h["Alive"] and h["Resources"].get("CPU")]
    remote = ray.remote(num_cpus=0, max_retries=0)(versions)
    asked = [
        remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(host["NodeID"], soft=False)
        ).remote()
        for host in hosts
    ]
    resources = ray.cluster_resources()
    gpus, cpus = (int(resources.get(kind, 0)) for kind in ("GPU", "CPU"))
    total = f"hosts for workers: {len(hosts)}, GPUs: {gpus}, CPUs: {cpus}"
    yield Check("Ray", "ok" if hosts else "failed", total, "" if hosts else "start workers of Ray")
    expected = versions()
    for host, answer in zip(hosts, asked, strict=True):
        name = f"Ray, {host['NodeManagerAddress']}"
        own = {kind: int(host["Resources"].get(kind, 0)) for kind in ("GPU", "CPU")}
        found = f"GPUs: {own['GPU']}, CPUs: {own['CPU']}"
        try:
            there = ray.get(answer, timeout=_PATIENCE)
        except ray.exceptions.RayTaskError as error:
            advice = "install fpo there as it is here"
            yield Check(name, "failed", f"{found}, fpo does not run: {error.cause}", advice)
            continue
        except (ray.exceptions.RayError, TimeoutError) as error:
            yield Check(name, "failed", f"{found}, no answer: {error}", "see Ray's logs there")
            continue
        found = ", ".join([found, *(f"{what} {version}" for what, version in there.items())])
        if different := [what for what, version in there.items() if version != expected[what]]:
            advice = f"install there what is here: {' and '.join(different)}"
            yield Check(name, "failed", found, advice)
        else:
            yield Check(name, "ok", found)


def versions() -> dict[str, str]:
    """Of what must be the same on every host, so that all score alike."""
    packages = {"fpo": "fpocli", "torch": "torch", "transformers": "transformers"}
    found = {what: metadata.version(package) for what, package in packages.items()}
    return {"Python": python_version()} | found
