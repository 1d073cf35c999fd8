"""What `fpo inspect` shows: the data first, then as JSON or for a terminal."""

import json
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from fpocli.catalog import find_model
from fpocli.config import InspectConfig
from fpocli.console import console, progress
from fpocli.errors import UserError
from fpocli.store import Features, Store

# The paper's Figure 2 shows the 50 largest mean activations.
_FIGURE_2 = 50
_FREQUENT = 10
_PAIR_FEATURES = 10


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Print what is in a store, and return it.

    Args:
        config: which store, and what of it.

    Raises:
        UserError: there is no readable store or pair, or --verify found damage.
    """
    store = Store.open(config.store)
    if config.pair is not None:
        shown = describe_pair(store, config.pair)
        show = _show_pair
    else:
        shown = describe(store)
        show = _show_store
    if config.verify:
        shown["verified"] = verify(store)
    if config.json:
        print(json.dumps(shown, indent=2))
    else:
        show(shown, Console(highlight=False, markup=False, soft_wrap=True))
    if damaged := shown.get("verified", {}).get("damaged"):
        for problem in damaged:
            console.print(problem)
        raise UserError(f"{store.path} is damaged in {len(damaged)} places", "write it again")
    return shown


# -- the data --------------------------------------------------------------------------------------


def describe(store: Store) -> dict[str, Any]:
    """Everything about a store but its pairs."""
    spans, missing = store.whole("spans"), store.missing_blocks()
    lengths = np.diff(spans)
    done = ~np.isin(np.arange(store.pairs) // store.block_size, missing)
    margins = store.whole("ref/margin")[done]
    total = spans[:, [2, 3]] - spans[:, [1, 2]] + (spans[:, 1] - spans[:, 0])[:, None]
    return {
        "path": str(store.path),
        **{name: store.meta[name] for name in ("format", "version", "state", "created", "writer")},
        "fingerprint": store.meta["fingerprint"],
        "blocks": {
            "done": store.blocks - len(missing),
            "all": store.blocks,
            "pairs_per_block": store.block_size,
        },
        **{name: store.meta[name] for name in ("model", "tokenizer", "data", "limits", "sites")},
        "pairs": store.meta["pairs"],
        "lengths": {
            name: _spread(lengths[:, column])
            for column, name in enumerate(("prompt", "chosen", "rejected"))
        }
        | {"responses_at_limit": int((total == store.meta["limits"]["max_length"]).sum())},
        "margin": _margin(margins),
        "features": {site: _features(store, site) for site in store.sites}
        if store.meta["state"] == "complete"
        else {},
        "arrays": {
            name: {"bytes": raw, "stored_bytes": stored}
            for name, (raw, stored) in store.sizes().items()
        },
    }


def _spread(values: np.ndarray) -> dict[str, float]:
    low, middle, high = np.percentile(values, [5, 50, 95])
    return {
        "min": int(values.min()),
        "5%": float(low),
        "median": float(middle),
        "mean": round(float(values.mean()), 1),
        "95%": float(high),
        "max": int(values.max()),
    }


def _margin(margins: np.ndarray) -> dict[str, Any]:
    if not len(margins):
        return {}
    counts, edges = np.histogram(margins, bins=15)
    return {
        "mean": float(margins.mean()),
        "std": float(margins.std()),
        "above_0": float((margins > 0).mean()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _features(store: Store, site: str) -> dict[str, Any]:
    mean, frequency = store.mean(site), store.frequency(site)
    largest = np.argsort(-mean, kind="stable")[:_FIGURE_2]
    frequent = np.argsort(-frequency.sum(0), kind="stable")[:_FREQUENT]
    return {
        "active": int((frequency.sum(0) > 0).sum()),
        "largest_mean": [{"feature": int(i), "mean": float(mean[i])} for i in largest],
        "most_frequent": [
            {
                "feature": int(i),
                "chosen": float(frequency[0, i] / store.pairs),
                "rejected": float(frequency[1, i] / store.pairs),
            }
            for i in frequent
        ],
    }


def describe_pair(store: Store, pair: int) -> dict[str, Any]:
    """The texts, numbers and largest features of one pair."""
    from fpocli.tokens import load_tokenizer

    if pair >= store.pairs:
        raise UserError(f"{store.path} has no pair {pair}", f"its pairs are 0 to {store.pairs - 1}")
    block, row = divmod(pair, store.block_size)
    tokens = store.tokens(block)
    tokenizer = load_tokenizer(find_model(store.meta["tokenizer"]["source"], weights=False))
    ids = tokens.pair(row)
    runs = {"prompt": ids.prompt, "chosen": ids.chosen, "rejected": ids.rejected}
    shown: dict[str, Any] = {
        "pair": pair,
        "source_row": ids.row,
        "tokens": {name: len(run) for name, run in runs.items()},
        "text": {name: tokenizer.decode(list(run)) for name, run in runs.items()},
    }
    if block in store.missing_blocks():
        return shown
    reference = store.reference(block, tokens)
    sums = dict(zip(("chosen", "rejected"), reference.logp[row].tolist(), strict=True))
    return shown | {
        "logp": sums,
        "average_logp": {name: sums[name] / shown["tokens"][name] for name in sums},
        "margin": float(reference.margin[row]),
        "features": {
            site: _pair_features(features, row) for site, features in reference.features.items()
        },
    }


def _pair_features(features: Features, row: int) -> dict[str, Any]:
    shown = {}
    for side, name in enumerate(("chosen", "rejected")):
        index, value = features.index[row, side], features.value[row, side]
        used = (value > 0)[:_PAIR_FEATURES]
        shown[name] = {
            "nonzero": int(features.nonzero[row, side]),
            "top": [
                {"feature": int(i), "value": float(v)}
                for i, v in zip(
                    index[:_PAIR_FEATURES][used], value[:_PAIR_FEATURES][used], strict=True
                )
            ],
        }
    return shown


def verify(store: Store) -> dict[str, Any]:
    """Read everything back: checksums of all chunks, and every block's own digest."""
    damaged = []
    missing = store.missing_blocks()
    with progress("Verifying", store.blocks) as bar:
        for block in range(store.blocks):
            try:
                tokens = store.tokens(block)
                if block not in missing:
                    store.reference(block, tokens)
            except UserError as error:
                damaged.append(str(error))
            bar.advance()
    if store.meta["state"] == "complete":
        damaged += [f"block {block} of {store.path} has no record" for block in missing]
        for site in store.sites:
            for read in (store.mean, store.frequency):
                try:
                    read(site)
                except UserError as error:
                    damaged.append(str(error))
    return {"blocks": store.blocks - len(missing), "gaps": len(missing), "damaged": damaged}


# -- for a terminal ----------------------------------------------------------------------------


def _show_store(shown: dict[str, Any], out: Console) -> None:
    model, data, tokenizer = shown["model"], shown["data"], shown["tokenizer"]
    blocks, pairs, limits = shown["blocks"], shown["pairs"], shown["limits"]
    head = _grid()
    for name, value in (
        ("store", f"{shown['path']}  ({shown['format']} {shown['version']})"),
        ("state", f"{shown['state']}, {blocks['done']} of {blocks['all']} blocks"),
        ("created", f"{shown['created']} by {_join(shown['writer'])}"),
        ("model", f"{model['source']}{_at(model['revision'])}, {model['architecture']}"),
        ("", f"{model['dtype']}, {model['attention']} attention, weights {model['hash'][:12]}"),
        ("data", f"{data['source']}{_at(data['revision'])} {data['split'] or ''}"),
        ("template", f"{tokenizer['chat_template']['name']}"),
        ("limits", _join(limits)),
        ("pairs", f"{pairs['kept']:,} kept of {pairs['read']:,} read"),
        *((" ", f"{count:,} dropped: {why}") for why, count in pairs["dropped"].items()),
        *(
            (f"site {number}", f"{site}: {about['sae']['source']}, {about['sae']['architecture']}, "
             f"{about['d_sae']:,} features, the largest {about['k']} kept")
            for number, (site, about) in enumerate(shown["sites"].items())
        ),
        ("fingerprint", shown["fingerprint"][:16]),
    ):  # fmt: skip
        head.add_row(name, value)
    out.print(head)

    lengths = dict(shown["lengths"])
    full = lengths.pop("responses_at_limit")
    out.print(f"\nLengths in tokens ({full:,} responses reach the limit)")
    columns = list(lengths["prompt"])
    table = Table("", *columns, box=None, header_style="")
    for name, spread in lengths.items():
        table.add_row(name, *(f"{spread[column]:g}" for column in columns))
    out.print(table)

    if margin := shown["margin"]:
        out.print(
            f"\nMargin of the reference, nats per token: mean {margin['mean']:.4f}, "
            f"std {margin['std']:.4f}, above 0 in {margin['above_0']:.1%}"
        )
        counts, edges = margin["histogram"]["counts"], margin["histogram"]["edges"]
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
            out.print(f"  {low:8.3f} to {high:7.3f} {count:7,} {_bar(count / max(counts), 40)}")

    for site, about in shown["features"].items():
        _show_features(site, about, out)

    out.print("\nSize per array")
    table = Table("array", "raw", "on disk", box=None, header_style="")
    for name, size in shown["arrays"].items():
        table.add_row(name, f"{size['bytes']:,}", f"{size['stored_bytes']:,}")
    table.add_row("all", *(f"{sum(s[k] for s in shown['arrays'].values()):,}"
                           for k in ("bytes", "stored_bytes")))  # fmt: skip
    out.print(table)
    _show_verified(shown, out)


def _show_features(site: str, about: dict[str, Any], out: Console) -> None:
    largest = about["largest_mean"]
    out.print(
        f"\n{site}: {about['active']:,} features are active somewhere.\n"
        f"Mean activation of the {len(largest)} largest, sorted (the paper's Figure 2)"
    )
    top = largest[0]["mean"] or 1.0
    height = 8
    for level in range(height, 0, -1):
        columns = "".join(
            " ▁▂▃▄▅▆▇█"[round(8 * min(1, max(0, item["mean"] / top * height - level + 1)))]
            for item in largest
        )
        label = f"{top * level / height:9.3f}" if level in (height, height // 2) else " " * 9
        out.print(f"{label} ┤{columns}")
    out.print(f"{' ' * 10}└{'─' * len(largest)}")
    out.print("The first: " + ", ".join(f"{i['feature']} ({i['mean']:.3f})" for i in largest[:8]))
    out.print("Most frequent (share of chosen, of rejected responses):")
    out.print(
        "  "
        + ", ".join(
            f"{item['feature']} ({item['chosen']:.0%}, {item['rejected']:.0%})"
            for item in about["most_frequent"]
        )
    )


def _show_pair(shown: dict[str, Any], out: Console) -> None:
    out.print(f"Pair {shown['pair']} (row {shown['source_row']} of the data)")
    for name, text in shown["text"].items():
        out.print(f"\n── {name}, {shown['tokens'][name]} tokens " + "─" * 40)
        out.print(text)
    if "logp" not in shown:
        out.print("\nIts block has not been scored yet.")
        return
    out.print()
    table = Table("", "chosen", "rejected", box=None, header_style="")
    for title, name in (("log-probability, nats", "logp"), ("per token", "average_logp")):
        table.add_row(title, *(f"{shown[name][side]:.4f}" for side in ("chosen", "rejected")))
    out.print(table)
    out.print(f"margin {shown['margin']:.4f} nats per token")
    for site, sides in shown["features"].items():
        out.print(f"\n{site}")
        for side, about in sides.items():
            top = ", ".join(f"{item['feature']} ({item['value']:.3f})" for item in about["top"])
            out.print(f"  {side}: {about['nonzero']} features above 0; largest {top}")
    _show_verified(shown, out)


def _show_verified(shown: dict[str, Any], out: Console) -> None:
    if verified := shown.get("verified"):
        found = f"{len(verified['damaged'])} damaged" if verified["damaged"] else "nothing wrong"
        out.print(
            f"\nVerified {verified['blocks']} blocks ({verified['gaps']} not written yet): {found}"
        )


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    return grid


def _bar(share: float, width: int) -> str:
    return "█" * round(share * width) or ("▏" if share > 0 else "")


def _join(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _at(revision: str | None) -> str:
    return f" at {revision[:12]}" if revision else ""
