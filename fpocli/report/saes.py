"""fpo saes: the pre-trained SAEs of a model, from sae-lens's list. Nothing is downloaded."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from fpocli.config import SaesConfig
from fpocli.features.known_saes import base_model, known_saes, preferred_saes
from fpocli.model.network import read_config
from fpocli.system.console import data_console, progress, say
from fpocli.system.errors import UserError
from fpocli.system.model_folder import SHORT_NAMES, find_model


def saes(config: SaesConfig) -> list[dict[str, Any]]:
    """Print the SAEs of a model, and return them.

    Args:
        config: the model, and the layer if only one is of interest.

    Returns:
        by SAE: the model it was trained on, site, width, l0, id, and whether it is the default.

    Raises:
        UserError: sae-lens has none for this model or layer.
    """
    model: str | None = SHORT_NAMES.get(config.model, config.model)
    with progress("Reading sae-lens's list of SAEs", None):
        known = [] if Path(config.model).is_dir() else known_saes(str(model))
        by_shape = not known
        if by_shape:
            model = _base_model(config.model)
            known = known_saes(model) if model else []
        defaults = set(preferred_saes(model).values()) if model else set()
    if not known:
        raise UserError(
            f"sae-lens knows no SAE of {config.model}",
            "`fpo cache --sae` takes any SAE that sae-lens can load; a fine-tuned model can use "
            "those of its base model",
        )
    found = [sae for sae in known if config.layer in (None, sae.site.layer)]
    if not found:
        layers = dict.fromkeys(str(sae.site.layer) for sae in known)
        raise UserError(
            f"sae-lens knows no SAE of {config.model} at layer {config.layer}",
            f"the layers it knows are {', '.join(layers)}",
        )
    rows = [
        {
            "model": model,
            "site": str(sae.site),
            "width": sae.width,
            "l0": sae.l0,
            "id": sae.source,
            "default": sae.source in defaults,
        }
        for sae in found
    ]
    if config.json:
        print(json.dumps(rows, indent=2))
        return rows
    if by_shape:
        say(f"these were trained on {model}, whose shape {config.model} has")
    table = Table("site", "width", "l0", "--sae", "", box=None, header_style="")
    for sae, row in zip(found, rows, strict=True):
        l0 = "-" if sae.l0 is None else f"{sae.l0:g}"
        default = "default" if row["default"] else ""
        table.add_row(str(sae.site), sae.width or "-", l0, sae.source, default)
    # Wide enough for every id, which are there to be copied.
    data_console(width=1000).print(table)
    return rows


def _base_model(name: str) -> str | None:
    """The model that has SAEs for one that sae-lens does not know: by the name if it is Google's,
    else by its shape; None if there is none, or its shape is not known here."""
    google = SHORT_NAMES.get(name, name)
    if google in SHORT_NAMES.values():
        return google.removesuffix("-it")
    try:
        folder = find_model(name, weights=False)
    except UserError:
        # The hub cannot be reached, or has no such model; a folder must be right.
        if Path(name).is_dir():
            raise
        return None
    return base_model(folder, read_config(folder))
