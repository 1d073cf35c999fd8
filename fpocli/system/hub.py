"""Errors of the Hugging Face hub as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager

from fpocli.system.errors import UserError


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turn errors of huggingface_hub and datasets into a sentence about `what`."""
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
    # HTTPError is that of the HTTP client: a broken connection.
    except (errors.OfflineModeIsEnabled, errors.HTTPError, ConnectionError) as error:
        raise UserError(
            f"{what} is not on this machine and the hub cannot be reached", offline
        ) from error
