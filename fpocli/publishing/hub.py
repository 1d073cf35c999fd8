"""Pushes a folder to a repository of the Hugging Face hub."""

from pathlib import Path
from typing import Any

from fpocli.system.console import progress, say
from fpocli.system.errors import UserError


def push(
    folder: Path,
    repository: str,
    kind: str,
    *,
    private: bool,
    inside: str = "",
    card: str = "",
) -> None:
    """Create a repository if there is none, and upload a folder's files. Files of the repository
    that are not in the folder stay.

    Args:
        folder: what is uploaded.
        repository: OWNER/NAME.
        kind: model or dataset.
        private: whether a new repository is.
        inside: the folder of the repository that they go to.
        card: README.md of the repository; "" if the folder has one.

    Raises:
        UserError: there is no token, the hub refuses, or it cannot be reached.
    """
    from huggingface_hub import HfApi, errors, get_token

    if get_token() is None:
        raise UserError(
            f"pushing to {repository} needs a token of the hub",
            "log in with `hf auth login`, or set HF_TOKEN",
        )
    api = HfApi()
    try:
        with progress(f"Uploading to {repository}", None):
            url = api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
            where: dict[str, Any] = {
                "repo_id": url.repo_id,
                "repo_type": kind,
                "commit_message": "fpo export",
            }
            if card:
                api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **where)
            api.upload_folder(
                folder_path=folder, path_in_repo=inside, ignore_patterns="*.partial", **where
            )
    except errors.HFValidationError as error:
        raise UserError(f"--push-to-hub {repository}: {error}", "write OWNER/NAME") from error
    except errors.HfHubHTTPError as error:
        raise UserError(
            f"the hub refused to push to {repository}: {error}",
            "the token must be allowed to write there; `hf auth whoami` shows whose it is",
        ) from error
    except ValueError as error:
        # Of the front matter of a card.
        raise UserError(f"the hub refused the card: {error}", "report this as a bug") from error
    # HTTPError is that of the HTTP client: a broken connection.
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError) as error:
        raise UserError(
            f"the hub cannot be reached: {error}",
            "check the network and HF_ENDPOINT, unset HF_HUB_OFFLINE, and run the same command "
            "again; the card is written",
        ) from error
    say(f"pushed to {url}")
