"""The files of one checkpoint: tensors in safetensors, and checkpoint.json with their digests."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fpocli.system.errors import UserError
from fpocli.system.files import sha256_of
from fpocli.system.json_yaml import is_file_name, read_json

_DOCUMENT = "checkpoint.json"
# Most bytes of tensors that a rank holds before it writes them.
_HELD = 2**30


def write_tensors(
    folder: Path, rank: int, tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, str]:
    """Write the tensors of a rank to files of about a gigabyte.

    Args:
        folder: of the checkpoint.
        rank: of this process.
        tensors: names and tensors on the CPU, contiguous; each is asked for when it is needed.

    Returns:
        the SHA-256 of each file, by its name.
    """
    digests: dict[str, str] = {}
    held: dict[str, torch.Tensor] = {}

    def write() -> None:
        file = folder / f"rank{rank}-{len(digests)}.safetensors"
        save_file(held, file)
        digests[file.name] = sha256_of(file)
        held.clear()

    for name, tensor in tensors:
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > _HELD:
            write()
        held[name] = tensor
    if held:
        write()
    return digests


def write_document(folder: Path, step: int, alpha: float, digests: dict[str, str]) -> None:
    """Write checkpoint.json.

    Args:
        folder: of the checkpoint.
        step: how many steps are done.
        alpha: of the next step.
        digests: of the files of all ranks.
    """
    content = {"step": step, "alpha": alpha, "files": digests}
    text = json.dumps(content | {"digest": _digest(content)}, indent=1)
    (folder / _DOCUMENT).write_text(text, encoding="utf-8")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are intact.

    Args:
        step: how many steps are done.
        alpha: of the next step.
        files: the open file of each tensor, by the tensor's name.
    """

    step: int
    alpha: float
    files: dict[str, Any]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor, on the CPU. Its file is mapped, so only what is used of it is read."""
        return self.files[name].get_tensor(name)


def open_checkpoint(
    folder: Path, rank: int, world: int, shapes: dict[str, tuple[int, ...]]
) -> Checkpoint:
    """Open a checkpoint. The ranks share the work of comparing its files with their digests.

    Args:
        folder: of the checkpoint.
        rank: of this process, which compares every `world`-th file.
        world: number of processes.
        shapes: of the tensors that it must have, by name.

    Raises:
        UserError: a file is damaged or missing, or the tensors are others.
    """
    document = folder / _DOCUMENT
    if not document.is_file() and any(folder.glob("*.pt")):
        raise UserError(
            f"the checkpoint {folder} is in DeepSpeed's format, which earlier versions of fpo used",
            "finish the run with the version that began it, or start over with --overwrite",
        )
    content = _read_document(document)
    try:
        for number, (name, expected) in enumerate(sorted(content["files"].items())):
            file = folder / name
            if number % world == rank and sha256_of(file) != expected:
                raise _refusal(file, "is damaged")
        files: dict[str, Any] = {}
        for file in map(folder.joinpath, content["files"]):
            opened = safe_open(file, "pt")
            files |= dict.fromkeys(opened.keys(), opened)
    except FileNotFoundError as error:
        raise _refusal(file, "is missing") from error
    except SafetensorError as error:
        raise _refusal(file, f"is damaged: {error}") from error
    found = {name: tuple(file.get_slice(name).get_shape()) for name, file in files.items()}
    if found != shapes:
        different = min(
            name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)
        )
        raise _refusal(folder, f"is that of another model: {different} differs")
    return Checkpoint(content["step"], content["alpha"], files)


def _read_document(document: Path) -> dict[str, Any]:
    """What `write_document` wrote."""
    try:
        content = read_json(document)
        written = content.pop("digest") == _digest(content)
        if not (written and all(map(is_file_name, content["files"]))):
            raise ValueError(content)
    except FileNotFoundError as error:
        raise _refusal(document, "is missing") from error
    except (UserError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _refusal(document, "is damaged") from error
    return content


def _refusal(file: Path, why: str) -> UserError:
    return UserError(
        f"the checkpoint cannot be loaded: {file} {why}",
        "delete its folder to resume from an older one, or start over with --overwrite",
    )


def _digest(content: dict[str, Any]) -> str:
    """Of the document itself."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
