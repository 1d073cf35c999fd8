"""A model's files: short names and hub ids -> a local folder that was checked."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fpocli.system.console import progress
from fpocli.system.errors import UserError
from fpocli.system.hub import hub_errors
from fpocli.system.json_yaml import is_file_name, read_json

SHORT_NAMES = {
    f"gemma-{name}": f"google/gemma-{name}"
    for name in (
        "2-2b", "2-2b-it", "2-9b", "2-9b-it", "2-27b", "2-27b-it", "3-270m", "3-270m-it",
        "3-1b-pt", "3-1b-it", "3-4b-pt", "3-4b-it", "3-12b-pt", "3-12b-it", "3-27b-pt", "3-27b-it",
    )
}  # fmt: skip
# Layers, heads, experts or labels.
_MOST_PARTS = 10_000


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine.

    Args:
        source: the hub id or folder the user named.
        path: the folder with config, tokeniser and weights.
        revision: the hub's commit; None for a local folder.
        trust_remote_code: whether Python code in it may be run.
        load_in_4bit: whether its linear layers are held in 4 bits.
    """

    source: str
    path: Path
    revision: str | None
    trust_remote_code: bool = False
    load_in_4bit: bool = False

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files, sorted by name."""
        return sorted(self.path.glob("*.safetensors"))

    def weights_hash(self) -> str:
        """sha256 over the bytes of the weight files, in the order of their names."""
        files = self.weight_files
        digest = hashlib.sha256()
        size = sum(file.stat().st_size for file in files) / 1e6
        with progress("Hashing the weights (MB)", size) as bar:
            for file in files:
                with file.open("rb") as stream:
                    while chunk := stream.read(2**24):
                        digest.update(chunk)
                        bar.advance(len(chunk) / 1e6)
        return digest.hexdigest()


def find_model(
    name: str,
    *,
    revision: str | None = None,
    weights: bool = True,
    trust_remote_code: bool = False,
) -> ModelFolder:
    """Find a model's files, downloading them from the hub if necessary.

    Args:
        name: a short name, a hub id or a local folder.
        revision: commit on the hub; None is the newest.
        weights: False if configuration and tokeniser are enough.
        trust_remote_code: whether its Python code may be run.

    Raises:
        UserError: the model does not exist, may not be read, or the hub cannot be reached; or its
            files refer to files outside the folder, or to absurd sizes.
    """
    source = SHORT_NAMES.get(name, name)
    if Path(source).is_dir():
        path = Path(source)
    else:
        from huggingface_hub import snapshot_download

        with hub_errors(f"the model {source}"):
            patterns = ["*.json", "*.jinja", "*.model", *(["model*.safetensors"] * weights)]
            patterns += ["*.py"] * trust_remote_code
            path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    if not (path / "config.json").is_file():
        raise UserError(f"{source} has no config.json", "name a folder with a transformers model")
    _check_names(source, path)
    folder = ModelFolder(
        source, path, None if Path(source).is_dir() else path.name, trust_remote_code
    )
    if weights and not folder.weight_files:
        raise UserError(
            f"{source} has no *.safetensors weights",
            "convert it with transformers' save_pretrained; pickled weights are not read",
        )
    for file in folder.weight_files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"the weights {file} are damaged: {error}", "download them again"
            ) from error
    return folder


def _check_names(source: str, path: Path) -> None:
    """Refuse a folder whose files lead transformers out of it, or into endless work."""
    config, tokenizer = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if not isinstance(value, dict):
            raise UserError(f"{name} of {source} is not a JSON object", "download the model again")
    if large := _too_large(config):
        raise UserError(
            f"config.json of {source} has {large}, which no model has", "download the model again"
        )
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{source} is an adapter, which refers to a model elsewhere",
            "merge the adapter into its model and save the result",
        )
    named = [config.get("transformers_weights") or "model.safetensors"]
    named += _list(tokenizer.get("fast_tokenizer_files"))
    for index in path.glob("*.safetensors.index.json"):
        about = read_json(index)
        files = about.get("weight_map") if isinstance(about, dict) else None
        if not isinstance(files, dict):
            raise UserError(f"{index} has no `weight_map`", "download the model again")
        named += files.values()
    if outside := [name for name in named if not is_file_name(name)]:
        raise UserError(
            f"the files of {source} refer to {outside[0]!r}, which is not directly inside it",
            "use a folder as transformers' save_pretrained writes it",
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _too_large(config: dict[str, Any]) -> str | None:
    """The first absurd count, such as "num_hidden_layers = 10000000".

    transformers creates an object for each layer, label and expert before it reads a weight.
    """
    for name, value in config.items():
        if isinstance(value, dict) and (large := _too_large(value)):
            return f"{name}.{large}"
        counts = isinstance(value, (int, float)) and re.search("layer|label|expert|head", name)
        if counts and value > _MOST_PARTS:
            return f"{name} = {value}"
    return None


def refuse_code(folder: ModelFolder, error: Exception) -> None:
    """Explain what to do if transformers' error is that the folder's code may not be run."""
    if not folder.trust_remote_code and "trust_remote_code" in str(error):
        raise UserError(
            f"{folder.source} needs Python code that comes with it, which is not run by default",
            "read that code, and add --trust-remote-code if you trust it",
        ) from error
