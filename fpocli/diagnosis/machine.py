"""What is on this machine: packages, devices, compilers, disk."""

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from fpocli.diagnosis.check import Check

_NEEDED = ("torch", "transformers", "deepspeed", "zarr", "sae-lens")
_OPTIONAL = ("liger-kernel", "ray", "obstore", "peft", "bitsandbytes")
# Flags in /proc/cpuinfo of instructions that multiply in bfloat16, on x86 and on ARM.
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
# Less than training Gemma-2-2B takes: weights twice and one checkpoint, in bytes.
_LITTLE_DISK = 50e9


def software() -> Iterator[Check]:
    """fpo, Python and the packages that matter, with their versions."""
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    fpo = metadata.version("fpocli")
    yield Check("fpo", "ok", f"{fpo}, Python {platform.python_version()}, {system}")
    required = {one.name: one for one in map(Requirement, metadata.requires("fpocli") or [])}
    for name in _NEEDED + _OPTIONAL:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in _NEEDED:
                yield Check(name, "failed", "not installed", _install(required[name]))
            continue
        one = required.get(name)
        if one and not one.specifier.contains(version, prereleases=True):
            yield Check(name, "failed", version, _install(one))
        else:
            yield Check(name, "ok", version)


def _install(package: Requirement) -> str:
    return f"pip install '{package.name}{package.specifier}'"


def devices() -> Iterator[Check]:
    """The CPU, and each GPU that torch or the driver sees."""
    yield _cpu()
    import torch

    driver = _nvidia_smi()
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            free, total = torch.cuda.mem_get_info(number)
            found = (
                f"{about.name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, compute capability "
                f"{about.major}.{about.minor}, driver {driver or 'unknown'}, torch for CUDA "
                f"{torch.version.cuda}"
            )
            if about.major >= 8:
                yield Check(f"cuda:{number}", "ok", found)
            else:
                advice = "bfloat16 is slow before 8.0: use --dtype float32 and --no-bf16"
                yield Check(f"cuda:{number}", "note", found, advice)
    elif driver:
        yield Check(
            "GPU",
            "failed",
            f"torch {torch.__version__} can use none, while nvidia-smi answers: {driver}",
            "install the build of torch for this driver, see pytorch.org; or CUDA_VISIBLE_DEVICES "
            "hides the GPU",
        )
    else:
        yield Check("GPU", "note", "none", "every command runs on the CPU, much more slowly")


def _cpu() -> Check:
    file = Path("/proc/cpuinfo")
    words = set(file.read_text().split()) if file.is_file() else set()
    found = f"{os.cpu_count()} logical cores, "
    if known := sorted(words & _BFLOAT16):
        return Check("CPU", "ok", found + f"bfloat16 by {', '.join(known)}")
    return Check(
        "CPU",
        "note",
        found + ("no bfloat16 instructions" if words else "bfloat16 instructions unknown"),
        "on a CPU without them bfloat16 is slow: use --dtype float32 and --no-bf16",
    )


def _nvidia_smi() -> str | None:
    """The version of NVIDIA's driver, or what is wrong with it; None without one."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Its errors are on stdout as well.
    return next(iter(done.stdout.splitlines()), None)


def compilers() -> Iterator[Check]:
    """What Triton and DeepSpeed would compile with."""
    import torch

    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h").is_file()
    tools = {
        "a C compiler": compiler,
        "Python's headers": headers,
        "nvcc": shutil.which("nvcc"),
        "ninja": shutil.which("ninja"),
    }
    there = ", ".join(name for name, found in tools.items() if found) or "none"
    gpu = torch.cuda.is_available()
    if gpu and not (compiler and headers):
        # Not every version of Triton does; the self-test shows it.
        advice = "Triton compiles with a C compiler and Python's headers: install gcc, python3-dev"
        yield Check("compilers", "note", there, advice)
    else:
        # fpo's optimiser is torch's, and training/engine.py keeps DeepSpeed from compiling others.
        why = "DeepSpeed needs none for fpo's own settings" if gpu else "none is needed on a CPU"
        yield Check("compilers", "ok", f"{there}; {why}")


def disk() -> Iterator[Check]:
    """Free disk where stores go if --out names no other folder, and where the hub's files go."""
    from huggingface_hub import constants

    places = {"this folder": Path.cwd(), "the hub's cache": Path(constants.HF_HUB_CACHE)}
    for place, advice in zip(places, ("--out", "HF_HOME"), strict=True):
        # The cache does not exist before the first download.
        folder = next(p for p in (places[place], *places[place].parents) if p.exists())
        free = shutil.disk_usage(folder).free
        found, name = f"{free / 1e9:.1f} GB free", f"disk, {place}"
        if not os.access(folder, os.W_OK):
            yield Check(name, "failed", f"{found}, not writable", f"use another folder: {advice}")
        elif free < _LITTLE_DISK:
            yield Check(name, "note", found, f"little for training Gemma-2-2B: see {advice}")
        else:
            yield Check(name, "ok", found)
