"""What can be known of examples/cluster without Slurm, Kubernetes and GPUs.

`make lint` runs shellcheck on the scripts, and checks compose.yaml against the Compose
specification.
"""

import argparse
import shlex
from collections.abc import Iterator
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml
from torch.distributed.run import get_args_parser

from fpocli.cli.commands import app

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "examples" / "cluster"
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
MANIFESTS = [
    manifest
    for file in sorted(CLUSTER.glob("kubernetes/*.yaml"))
    for manifest in yaml.safe_load_all(file.read_text())
]
COMPOSE = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]
# The fields of a RayJob, its cluster and its groups that an example may set, from KubeRay's
# ray-operator/apis/ray/v1, rayjob_types.go and raycluster_types.go. No package has their schema.
RAY_JOB = {
    "activeDeadlineSeconds",
    "backoffLimit",
    "entrypoint",
    "rayClusterSpec",
    "shutdownAfterJobFinishes",
    "submissionMode",
    "ttlSecondsAfterFinished",
}
RAY_CLUSTER = {"rayVersion", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
RAY_HEAD = {"rayStartParams", "template"}
RAY_WORKERS = RAY_HEAD | {"groupName", "replicas", "minReplicas", "maxReplicas"}


def manifest(kind: str) -> dict:
    (found,) = (manifest for manifest in MANIFESTS if manifest["kind"] == kind)
    return found


def pods() -> list[dict]:
    """The pod templates of the manifests."""
    cluster = manifest("RayJob")["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"], manifest("Job")["spec"]]
    return [group["template"] for group in groups]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Where a command is, and its words."""
    for file in sorted(CLUSTER.glob("slurm/*.sbatch")):
        for line in file.read_text().replace("\\\n", " ").splitlines():
            words = shlex.split(line.removesuffix(" &"), comments=True)
            yield file.name, words
    for service in COMPOSE.values():
        yield "compose.yaml", ["fpo", *shlex.split(service["command"])]
    yield "cache.yaml", shlex.split(manifest("RayJob")["spec"]["entrypoint"])
    (container,) = manifest("Job")["spec"]["template"]["spec"]["containers"]
    # Kubernetes fills in the number of the pod.
    yield (
        "train.yaml",
        [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["command"]]
        + container["args"],
    )


# Of the commands that end in one of fpo, also `torchrun ... -m fpocli train ...`.
FPO = [(place, words) for place, words in commands() if {"fpo", "fpocli"} & {*words}]


def torchrun(place: str) -> argparse.Namespace:
    """What torchrun understands of its command."""
    (words,) = (words for where, words in FPO if where == place)
    return get_args_parser().parse_args(words[words.index("torchrun") + 1 :])


def test_every_file_has_a_command_of_fpo():
    files = {file.name for file in CLUSTER.rglob("*") if file.is_file()}
    assert files - {place for place, _ in FPO} == {"README.md", "volume.yaml"}


@pytest.mark.parametrize("place, words", FPO, ids=[place for place, _ in FPO])
def test_the_command_line_takes_every_command(place, words):
    """It is parsed, not run."""
    (name,) = {"fpo", "fpocli"} & {*words}
    words = words[words.index(name) + 1 :]
    program = typer.main.get_command(app)
    with program.make_context("fpo", words.copy()) as context:
        name, command, rest = program.resolve_command(context, words)
        command.make_context(name, rest, parent=context)


def test_the_nodes_of_the_slurm_job_meet_at_the_first():
    launch = torchrun("train.sbatch")
    assert (launch.module, launch.training_script) == (True, "fpocli")
    assert launch.training_script_args[0] == "train"
    assert (launch.nnodes, launch.nproc_per_node) == ("$SLURM_JOB_NUM_NODES", "gpu")
    assert (launch.rdzv_backend, launch.rdzv_endpoint) == ("c10d", "$first:29500")


def test_the_pods_of_the_training_job_meet_at_the_first():
    job, service, launch = manifest("Job"), manifest("Service"), torchrun("train.yaml")
    assert (launch.module, launch.training_script) == (True, "fpocli")
    assert launch.training_script_args[0] == "train"
    pod, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(launch.nnodes)
    assert (launch.node_rank, launch.master_addr) == (1, f"{name}-0.{pod['subdomain']}")
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    limits = pod["containers"][0]["resources"]["limits"]
    assert launch.nproc_per_node == str(limits["nvidia.com/gpu"])


def test_manifests_fit_the_schemas_of_kubernetes():
    """Those of the newest version that the package has. An unknown field is an error as well."""
    newest = kubernetes_validate.latest_version()
    plain = [manifest for manifest in MANIFESTS if not manifest["apiVersion"].startswith("ray.io")]
    # The pods of the RayJob, each as an object of the kind that holds nothing else.
    templates = [
        {"apiVersion": "v1", "kind": "PodTemplate", "template": template} for template in pods()
    ]
    for checked in plain + templates:
        kubernetes_validate.validate(checked, newest, strict=True)


def test_the_ray_job_has_no_unknown_field():
    job = manifest("RayJob")
    assert job["apiVersion"] == "ray.io/v1"
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    cluster = job["spec"]["rayClusterSpec"]
    assert job["spec"].keys() <= RAY_JOB and cluster.keys() <= RAY_CLUSTER
    assert cluster["headGroupSpec"].keys() == RAY_HEAD
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == RAY_WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_version_of_ray_is_that_of_the_image():
    assert manifest("RayJob")["spec"]["rayClusterSpec"]["rayVersion"] == PINNED["ray"]


def test_every_volume_that_is_mounted_exists():
    claim = manifest("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods():
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        (container,) = pod["spec"]["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes.keys()
        assert volumes["work"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


def test_compose_trains_what_it_has_cached_on_the_gpus_it_reserves():
    depends = COMPOSE["train"]["depends_on"]
    assert depends == {"cache": {"condition": "service_completed_successfully"}}
    (gpus,) = COMPOSE["train"]["deploy"]["resources"]["reservations"]["devices"]
    words = shlex.split(COMPOSE["train"]["command"])
    assert words[words.index("--gpus") + 1] == str(gpus["count"])
