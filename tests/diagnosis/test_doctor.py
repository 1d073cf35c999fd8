"""fpo doctor finds what is broken on a machine, and its report can be published."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from fpocli import DoctorConfig
from fpocli.cli.commands import app
from fpocli.diagnosis import doctor, machine, network
from fpocli.diagnosis.check import Check
from fpocli.diagnosis.self_test import self_test
from fpocli.model import attention, head

KERNELS = "cpu, {}, attention fpo_by_sequence, head chunked"
DTYPES = ("float32", "bfloat16")


def run(*flags):
    return CliRunner().invoke(app, ["doctor", *flags])


def test_this_machine_passes():
    done = run()
    assert done.exit_code == 0, done.output
    listed, report = done.stdout.split("For a bug report:")
    for dtype in DTYPES:
        assert f"ok      {KERNELS.format(dtype)}: within " in listed
    assert "failed" not in done.stdout
    assert f"ok      torch: {torch.__version__}" in report


def test_json_is_what_is_printed():
    done = run("--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert {check["verdict"] for check in found["checks"]} <= {"ok", "note"}
    lines = found["report"].splitlines()
    assert len(lines) == len(found["checks"]) > 10
    for line, check in zip(lines, found["checks"], strict=True):
        assert line == f"{check['verdict']:6}  {check['name']}: {check['found']}"


def without_soft_cap(*arguments, real=attention.attend_by_sequence, **settings):
    return real(*arguments, **settings | {"softcap": None})


def without_window(batch, window, kernel, dtype, real=attention.attention_mask):
    return real(batch, None, kernel, dtype)


def with_half_the_gradient(*arguments, real=attention.attend_by_sequence, **settings):
    output, weights = real(*arguments, **settings)
    return (output + output.detach()) / 2, weights


def logits_with_a_larger_gradient(network, final, real=head.logits):
    values = real(network, final)
    return 1.25 * values - 0.25 * values.detach()


def that_does_not_compile(*arguments, **settings):
    raise ImportError("Failed to find C compiler")


@pytest.mark.parametrize(
    ("where", "broken", "sentence"),
    [
        ("attention.attend_by_sequence", without_soft_cap, "log-probabilities of a pair differ"),
        ("language_model.attention_mask", without_window, "log-probabilities of a pair differ"),
        ("attention.attend_by_sequence", with_half_the_gradient, "the gradient of model.layers."),
        ("head.logits", logits_with_a_larger_gradient, "the gradient of model."),
        ("attention.attend_by_sequence", that_does_not_compile, "Failed to find C compiler"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_kernel_is_found_and_named(monkeypatch, where, broken, sentence):
    monkeypatch.setattr(f"fpocli.model.{where}", broken)
    for check, dtype in zip(self_test(), DTYPES, strict=True):
        assert check.name == KERNELS.format(dtype)
        assert check.verdict == "failed" and sentence in check.found


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_failure_is_printed_with_its_advice_and_gives_exit_code_2(monkeypatch, flags):
    broken = Check("kernel", "failed", "it is wrong", "mend it")
    monkeypatch.setattr("fpocli.diagnosis.self_test.self_test", lambda: iter([broken]))
    done = run(*flags)
    assert done.exit_code == 2
    assert "error: failed: kernel\n" in done.stderr
    if flags:
        assert json.loads(done.stdout)["checks"][-1] == vars(broken)
    else:
        assert "failed  kernel: it is wrong\n        -> mend it\n" in done.stdout


def test_a_library_that_cannot_be_imported_ends_no_other_check(monkeypatch):
    def broken():
        raise ImportError("libcudart.so.13: cannot open shared object file")
        yield

    monkeypatch.setattr(machine, "devices", broken)
    checks = {check.name: check for check in doctor._checks(DoctorConfig())}
    assert checks["devices"].verdict == "failed"
    assert checks["devices"].found.startswith("ImportError: libcudart")
    assert checks[KERNELS.format("float32")].verdict == "ok"


@pytest.mark.parametrize("offline", [True, False])
def test_no_network_is_a_note(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    # A port on which nothing listens.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    (check,) = network.hub()
    assert check.verdict == "note"
    assert check.found.startswith("HF_HUB_OFFLINE" if offline else "127.0.0.1 cannot be reached (")


@pytest.mark.parametrize(("token", "verdict"), [(None, "note"), ("hf_secret", "ok")])
def test_a_token_is_reported_and_not_printed(monkeypatch, token, verdict):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://anna:secret@hub.example")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: token)
    answers = SimpleNamespace(head=lambda address, timeout: None)
    monkeypatch.setattr("huggingface_hub.get_session", lambda: answers)
    (check,) = network.hub()
    assert check.verdict == verdict
    assert check.found == f"hub.example answers, {'a token is set' if token else 'no token'}"


def test_the_report_names_no_user(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ray")
    text = "ray 2.5\n  in /home/ray/fpo/x.py, /tmp/torchinductor_ray/ab/c.py and /mnt/ray/array"
    expected = "ray 2.5 in ~/fpo/x.py, /tmp/torchinductor_user/ab/c.py and /mnt/user/array"
    assert Check("x", "failed", text).found == expected


def test_missing_and_old_packages_fail(monkeypatch):
    versions = dict.fromkeys(machine._NEEDED, "99") | {"torch": "1.0", "liger-kernel": "0.8.5"}
    del versions["zarr"]
    versions |= {"fpocli": "0.3.0", "transformers": "5.23.0", "sae-lens": "6.54.12"}

    def version(name):
        try:
            return versions[name]
        except KeyError:
            raise machine.metadata.PackageNotFoundError(name) from None

    monkeypatch.setattr(machine.metadata, "version", version)
    checks = {check.name: check for check in machine.software()}
    assert [name for name in checks if checks[name].verdict == "failed"] == ["torch", "zarr"]
    assert checks["torch"].advice == "pip install 'torch>=2.8'"
    assert checks["zarr"].found == "not installed"
    assert checks["liger-kernel"].found == "0.8.5" and "ray" not in checks


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU, as torch and nvidia-smi describe it."""
    about = SimpleNamespace(name="NVIDIA H100", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: about)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (70e9, 80e9))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: "580.65")
    return about


def test_a_gpu_is_described(gpu):
    *_, check = machine.devices()
    assert check == Check(
        "cuda:0",
        "ok",
        "NVIDIA H100, 70.0 of 80.0 GB free, compute capability 9.0, driver 580.65, torch for "
        "CUDA 13.0",
    )
    gpu.major = 7
    *_, check = machine.devices()
    assert check.verdict == "note" and "bfloat16" in check.advice


def test_a_gpu_that_torch_cannot_use_fails(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    *_, check = machine.devices()
    assert check.verdict == "failed" and "nvidia-smi answers: 580.65" in check.found
    monkeypatch.setattr(machine, "_nvidia_smi", lambda: None)
    *_, check = machine.devices()
    assert (check.verdict, check.found) == ("note", "none")


def test_a_compiler_is_needed_on_a_gpu_only(monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    (check,) = machine.compilers()
    assert check.verdict == "ok" and "none is needed on a CPU" in check.found
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (check,) = machine.compilers()
    assert check.verdict == "note" and "gcc" in check.advice


def test_a_cpu_without_bfloat16_is_a_note(monkeypatch):
    text = "flags : fpu avx2 {}"
    for more, verdict in (("", "note"), ("avx512_bf16", "ok")):
        file = SimpleNamespace(is_file=lambda: True, read_text=lambda m=more: text.format(m))
        monkeypatch.setattr(machine, "Path", lambda name, file=file: file)
        assert machine._cpu().verdict == verdict


@pytest.mark.parametrize(("free", "verdict"), [(1e12, "ok"), (3e9, "note")])
def test_little_disk_is_a_note(monkeypatch, tmp_path, free, verdict):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not/yet"))
    space = SimpleNamespace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: space)
    assert [check.verdict for check in machine.disk()] == [verdict] * 2
    monkeypatch.setattr(machine.os, "access", lambda folder, mode: False)
    assert [check.verdict for check in machine.disk()] == ["failed"] * 2


def test_the_fused_head_is_tested_as_well(monkeypatch):
    """On a GPU with liger-kernel both heads are in use: Liger's, and the chunked one under ZeRO-3
    and where distributions are looked at."""
    monkeypatch.setattr(head, "_liger_serves", lambda: True)
    weights = SimpleNamespace(bias=None, weight=torch.zeros(1))
    for kind, heads in (("cuda", [head.LIGER, head.CHUNKED]), ("cpu", [head.CHUNKED])):
        network = SimpleNamespace(
            get_output_embeddings=lambda: weights, device=SimpleNamespace(type=kind)
        )
        assert head.usable_heads(network) == heads
        assert head.choose_head(network) == heads[0]
