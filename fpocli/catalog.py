"""Names to places: short model names, hub ids and local folders; the SAE that goes with a site."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fpocli.console import progress
from fpocli.errors import UserError

# Short name -> (hub id, prefix of its Gemma Scope releases in sae-lens).
GEMMA = {
    "gemma-2-2b": ("google/gemma-2-2b", "gemma-scope-2b-pt"),
    "gemma-2-9b": ("google/gemma-2-9b", "gemma-scope-9b-pt"),
}
_SCOPE_SITE = {"resid_post": "res", "mlp_out": "mlp"}


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine.

    Args:
        source: the hub id or folder the user named.
        path: the folder that holds config, tokeniser and weights.
        revision: the hub's commit; None for a local folder.
    """

    source: str
    path: Path
    revision: str | None

    def weights_hash(self) -> str:
        """sha256 over the bytes of the weight files, in the order of their names."""
        files = sorted(self.path.glob("*.safetensors"))
        digest = hashlib.sha256()
        size = sum(file.stat().st_size for file in files) / 1e6
        with progress("Hashing the weights (MB)", size) as bar:
            for file in files:
                with file.open("rb") as stream:
                    while chunk := stream.read(2**24):
                        digest.update(chunk)
                        bar.advance(len(chunk) / 1e6)
        return digest.hexdigest()


def find_model(name: str, *, revision: str | None = None, weights: bool = True) -> ModelFolder:
    """The files of a model, fetched from the hub if they are not here yet.

    Args:
        name: a short name, a hub id or a local folder.
        revision: the hub's commit; None takes the newest.
        weights: False where configuration and tokeniser are enough.

    Raises:
        UserError: there is no such model, it may not be read, or the hub cannot be reached.
    """
    source = GEMMA[name][0] if name in GEMMA else name
    if Path(source).is_dir():
        path = Path(source)
    else:
        from huggingface_hub import snapshot_download

        with hub_errors(f"the model {source}"):
            patterns = ["*.json", "*.jinja", "*.model", *(["model*.safetensors"] * weights)]
            path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    if not (path / "config.json").is_file():
        raise UserError(f"{source} has no config.json", "name a transformers model folder")
    files = list(path.glob("*.safetensors"))
    if weights and not files:
        raise UserError(
            f"{source} has no *.safetensors weights",
            "convert it with transformers' save_pretrained; pickled weights are not read",
        )
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise UserError(
                f"the weights {file} are damaged: {error}", "fetch them anew"
            ) from error
    return ModelFolder(source, path, None if Path(source).is_dir() else path.name)


def default_sae(model: str, layer: int, kind: str) -> str:
    """Gemma Scope's canonical SAE of width 16k for a site of Gemma-2, as sae-lens release/id.

    Raises:
        UserError: no SAE is known for the model.
    """
    for short, (hub_id, release) in GEMMA.items():
        if model in (short, hub_id):
            return f"{release}-{_SCOPE_SITE[kind]}-canonical/layer_{layer}/width_16k/canonical"
    raise UserError(
        f"no SAE is known for {model}",
        "name one with --sae: a sae-lens release/id, a sae-lens folder or a params.npz",
    )


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn what huggingface_hub and datasets raise into a sentence about `what`."""
    from huggingface_hub import errors

    offline = (
        "check the network and HF_ENDPOINT, unset HF_HUB_OFFLINE, or name a local folder or file"
    )
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{what} is gated and this account may not read it",
            "accept its licence on the hub, then log in with `hf auth login`",
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            f"{what} is neither a local path nor on the hub",
            "check the spelling; a private one needs `hf auth login`",
        ) from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        if isinstance(error, errors.LocalEntryNotFoundError):
            raise UserError(
                f"{what} is not on this machine and the hub cannot be reached", offline
            ) from error
        raise UserError(f"{what} lacks a file: {error}", "check the name") from error
    except errors.HfHubHTTPError as error:
        raise UserError(f"the hub refused {what}: {error}", "try again later") from error
    # HTTPError is the HTTP client's own: a connection that broke.
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError) as error:
        raise UserError(
            f"{what} is not on this machine and the hub cannot be reached", offline
        ) from error
