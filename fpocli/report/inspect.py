"""fpo inspect: what is in a store, printed, as JSON, or as an HTML page."""

import json
from pathlib import Path
from typing import Any

from fpocli.config import InspectConfig
from fpocli.display.terminal import show_pair, show_store
from fpocli.report.describe import describe, describe_pair
from fpocli.store.metadata import REPAIR
from fpocli.store.reader import Store
from fpocli.store.verify import find_damage
from fpocli.system.console import data_console, say, warn
from fpocli.system.errors import UserError


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what is in a store, and return it.

    Args:
        config: which store, and what of it.

    Raises:
        UserError: there is no readable store or pair, or --verify found damage.
    """
    store = Store.open(config.store)
    if config.verify and (damage := find_damage(store)):
        if config.json:
            damaged = [one._asdict() for one in damage]
            print(json.dumps({"path": str(store.path), "damaged": damaged}, indent=2))
        for one in damage:
            warn(one.message)
        raise UserError(f"{store.path} is damaged, as listed above", REPAIR)
    if config.pair is not None:
        # Imports torch, which takes seconds.
        from fpocli.scoring.loading import find_tokenizer

        shown = describe_pair(store, config.pair, find_tokenizer(store, config.model))
        show = show_pair
    elif config.html:
        from fpocli.report.store_page import describe_for_page, write_store_page

        shown = describe_for_page(store, config)
        write_store_page(shown, Path(config.html))
        show = show_store
    else:
        shown = describe(store)
        show = show_store
    if config.plot:
        _plot(store, Path(config.plot))
    if config.verify:
        gaps = len(store.unscored_blocks())
        shown["verified"] = {"blocks": store.blocks - gaps, "gaps": gaps}
    if config.json:
        print(json.dumps(shown, indent=2))
    else:
        show(shown, data_console())
    return shown


def _plot(store: Store, file: Path) -> None:
    from fpocli.display.charts import draw_figure2

    store.require_complete()
    if not store.sites:
        raise UserError(f"{store.path} has no features to plot", "cache again with --layer")
    draw_figure2({site: store.mean(site) for site in store.sites}, file)
    say(f"Figure 2 is in {file}")
