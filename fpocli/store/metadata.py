"""The metadata files of a store, zarr.json, and checksums over them.

Zarr's chunks carry checksums, its metadata files do not. So the root's file holds the sha256 of
every other one, and of itself with zeros in the place of that sum.
"""

import hashlib
import json
from typing import Any

from fpocli.store.place import Place
from fpocli.store.schema import FORMAT, TOKENS_PER_CHUNK, array_schema
from fpocli.system.errors import UserError

DOCUMENT = "zarr.json"
REPAIR = "run the original `fpo cache` command with --repair added; undamaged blocks are kept"
_NO_SUM = "0" * 64


def write_root(place: Place, meta: dict[str, Any]) -> None:
    """Write the root group's metadata, atomically, with its sum as `checksum`."""
    about = {name: value for name, value in meta.items() if name != "checksum"}
    attributes = {"fpo": about | {"checksum": _NO_SUM}}
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    text = json.dumps(document, indent=2)
    place.write(DOCUMENT, text.replace(_NO_SUM, _sum(text.encode())).encode())


def read_root(place: Place) -> tuple[dict[str, Any], bool]:
    """The attributes under `fpo` of a folder's group, {} if there are none; and whether its
    metadata matches its checksum."""
    for _ in range(place.attempts - 1):
        about, whole = _read_root(place)
        if whole:
            return about, whole
    return _read_root(place)


def _read_root(place: Place) -> tuple[dict[str, Any], bool]:
    try:
        document = place.read(DOCUMENT)
        about = json.loads(document)["attributes"]["fpo"]
    # Brackets nested too deeply raise RecursionError.
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}, False
    if not isinstance(about, dict):
        return {}, False
    checksum = str(about.get("checksum")).encode()
    # Exactly once: only the checksum itself is replaced by zeros.
    whole = document.count(checksum) == 1 and (
        _sum(document.replace(checksum, _NO_SUM.encode())).encode() == checksum
    )
    return about, whole


def attributes(place: Place) -> dict[str, Any]:
    """The attributes under `fpo` of a folder's group, unchecked; {} if there are none."""
    return read_root(place)[0]


def is_begun(meta: dict[str, Any]) -> bool:
    """Whether attributes are those of a store whose token ids are not all written yet."""
    return meta.get("format") == FORMAT and meta.keys() <= {"format", "checksum"}


def document_sums(place: Place) -> dict[str, str]:
    """The sha256 of every metadata file except the root's, by the name of its group or array."""
    end = f"/{DOCUMENT}"
    keys = [key for key in place.files() if key.endswith(end)]
    return {key.removesuffix(end): _sum(place.read(key)) for key in sorted(keys)}


def array_document(place: Place, name: str) -> dict[str, Any]:
    """The metadata of a group or array, unchecked; {} if there is none."""
    try:
        document = json.loads(place.read(f"{name}/{DOCUMENT}"))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def check_documents(place: Place, meta: dict[str, Any]) -> None:
    """Refuse metadata that does not match its checksum, links out of the folder, and shapes with
    far more chunks than there are files.

    Args:
        place: of the store.
        meta: its attributes, checked.

    Raises:
        UserError: it names the document or array.
    """
    sums = meta.get("documents", {})
    for name in {*array_schema(meta), *sums}:
        for key in (f"{name}/{DOCUMENT}", f"{name}/c"):
            if place.leads_out(key):
                raise UserError(f"{place.name}/{key} leads out of the store", "write it again")
    for name, expected in sums.items():
        key = f"{name}/{DOCUMENT}"
        try:
            matches = any(_sum(place.read(key)) == expected for _ in range(place.attempts))
        except OSError as error:
            raise UserError(f"{place.name}/{key} is missing", REPAIR) from error
        if not matches:
            raise UserError(f"{place.name}/{key} is damaged or was edited", REPAIR)
    # Memory is allocated by these numbers, and the metadata may be made up.
    for name, chunks in (
        ("spans", -(-meta["pairs"]["kept"] // meta["block"])),
        ("tokens", -(-meta["tokens"] // TOKENS_PER_CHUNK)),
    ):
        there = sum(1 for _ in place.files(f"{name}/c/"))
        if chunks > 2 * there + 16:
            raise UserError(
                f"the array {name} of {place.name} has {there:,} of {chunks:,} chunks", REPAIR
            )


def _sum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
