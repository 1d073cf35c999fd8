"""Names to places: short model names, hub ids and local folders; the SAE that goes with a site."""

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

SHORT_NAMES = {"gemma-2-2b": "google/gemma-2-2b", "gemma-2-9b": "google/gemma-2-9b"}
# Layers, heads, experts or labels.
_MOST_PARTS = 10_000


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine.

    Args:
        source: the hub id or folder the user named.
        path: the folder that holds config, tokeniser and weights.
        revision: the hub's commit; None for a local folder.
        trust_remote_code: whether Python code among the files may be run.
    """

    source: str
    path: Path
    revision: str | None
    trust_remote_code: bool = False

    @property
    def weight_files(self) -> list[Path]:
        """In the order of their names."""
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
    """The files of a model, fetched from the hub if they are not here yet.

    Args:
        name: a short name, a hub id or a local folder.
        revision: the hub's commit; None takes the newest.
        weights: False where configuration and tokeniser are enough.
        trust_remote_code: whether its own Python code may be run.

    Raises:
        UserError: there is no such model, it may not be read, or the hub cannot be reached; or its
            files name others outside the folder, or sizes that no model has.
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
        raise UserError(f"{source} has no config.json", "name a transformers model folder")
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
                f"the weights {file} are damaged: {error}", "fetch them anew"
            ) from error
    return folder


def _check_names(source: str, path: Path) -> None:
    """Refuse a folder whose files send transformers elsewhere, or to work without end."""
    config, tokenizer = (
        read_json(path / name) if (path / name).is_file() else {}
        for name in ("config.json", "tokenizer_config.json")
    )
    for name, value in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if not isinstance(value, dict):
            raise UserError(f"{name} of {source} holds no JSON object", "fetch the model anew")
    if large := _too_large(config):
        raise UserError(f"config.json of {source} has {large}, which no model has", "mend it")
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{source} holds an adapter, which names a model elsewhere",
            "merge the adapter into its model and save the whole",
        )
    named = [config.get("transformers_weights") or "model.safetensors"]
    named += _list(tokenizer.get("fast_tokenizer_files"))
    for index in path.glob("*.safetensors.index.json"):
        about = read_json(index)
        files = about.get("weight_map") if isinstance(about, dict) else None
        if not isinstance(files, dict):
            raise UserError(f"{index} holds no `weight_map`", "fetch the model anew")
        named += files.values()
    if outside := [name for name in named if not is_file_name(name)]:
        raise UserError(
            f"the files of {source} name {outside[0]!r}, which is no file right inside its folder",
            "take a model folder as transformers' save_pretrained writes it",
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value else []


def _too_large(config: dict[str, Any]) -> str | None:
    """The first count of parts, such as "num_hidden_layers = 10000000", that is beyond reason.

    transformers makes an object for each layer, label and expert before it reads a weight.
    """
    for name, value in config.items():
        if isinstance(value, dict) and (large := _too_large(value)):
            return f"{name}.{large}"
        counts = isinstance(value, (int, float)) and re.search("layer|label|expert|head", name)
        if counts and value > _MOST_PARTS:
            return f"{name} = {value}"
    return None


def refuse_code(folder: ModelFolder, error: Exception) -> None:
    """Tell what to do where transformers' error is that the folder's code may not be run."""
    if not folder.trust_remote_code and "trust_remote_code" in str(error):
        raise UserError(
            f"{folder.source} needs Python code that comes with it, which is not run unasked",
            "read that code, and give --trust-remote-code if you trust it",
        ) from error
