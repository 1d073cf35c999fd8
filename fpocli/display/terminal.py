"""Tables of fpo inspect and fpo eval for a terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fpocli.system.sparkline import block


def show_store(shown: dict[str, Any], out: Console) -> None:
    """Print the result of report.inspect.describe."""
    model, data, tokenizer = shown["model"], shown["data"], shown["tokenizer"]
    blocks, pairs, limits = shown["blocks"], shown["pairs"], shown["limits"]
    in_4_bits = ", linear layers in 4 bits" if "quantization" in model else ""
    head = _grid()
    for name, value in (
        ("store", f"{shown['path']}  ({shown['format']} {shown['version']})"),
        ("state", f"{shown['state']}, {blocks['done']} of {blocks['all']} blocks"),
        ("created", f"{shown['created']} by {_join(shown['writer'])}"),
        ("model", f"{model['source']}{_at(model['revision'])}, {model['architecture']}{in_4_bits}"),
        ("", f"{model['dtype']}, {model['attention']} attention, weights {model['hash'][:12]}"),
        *((" ", _imported(about)) for about in [model.get("imported")] if about),
        *((" ", f"some blocks in {' and '.join(how)}") for how in shown["allowed"].values()),
        ("data", f"{data['source']}{_at(data['revision'])} {data['split'] or ''}"),
        *((" ", _source(number, source)) for number, source in enumerate(shown["sources"])),
        ("template", f"{tokenizer['chat_template']['name']}"),
        ("limits", _join(limits)),
        ("pairs", f"{pairs['kept']:,} kept of {pairs['read']:,} read"),
        *((" ", f"{count:,} dropped: {why}") for why, count in pairs["dropped"].items()),
        *(
            (" ", f"{len(gaps):,} of them without reference values: non-finite")
            for gaps in [pairs.get("not_finite")]
            if gaps
        ),
        *(
            (f"site {number}", f"{site}: {about['sae']['source']}, {about['sae']['architecture']}, "
             f"{about['d_sae']:,} features, the largest {about['k']} stored{_kept(about)}")
            for number, (site, about) in enumerate(shown["sites"].items())
        ),
        *([] if shown["sites"] else [("sites", "no features: for all constraints but features")]),
        *(("next tokens", _next_tokens(stored)) for stored in [shown["distributions"]] if stored),
        ("fingerprint", shown["fingerprint"][:16]),
    ):  # fmt: skip
        # A store from elsewhere may hold what controls a terminal.
        head.add_row(name, "".join(char if char.isprintable() else " " for char in value))
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


def _imported(about: dict[str, str]) -> str:
    held = "sums" if about["reduction"] == "sum" else "averages per token"
    return f"log-probabilities were not computed here: {held} of {about['source']}"


def _next_tokens(about: dict[str, Any]) -> str:
    which = "all" if about["n"] == about["vocabulary"] else f"the {about['n']:,} likeliest"
    text = f"{which} of {about['vocabulary']:,} at {about['positions']:,} positions, "
    text += about["dtype"]
    if coverage := about.get("coverage"):
        text += (
            f": {coverage['mean']:.1%} of the probability, below {coverage['5%']:.1%} at one "
            "position in twenty"
        )
    return text


def _show_features(site: str, about: dict[str, Any], out: Console) -> None:
    largest = about["largest_mean"]
    out.print(
        f"\n{site}: {about['active']:,} features are active somewhere.\n"
        f"Mean activation of the {len(largest)} largest features, in descending order (the paper's "
        "Figure 2)"
    )
    top = largest[0]["mean"] or 1.0
    height = 8
    for level in range(height, 0, -1):
        columns = "".join(block(item["mean"] / top * height - level + 1) for item in largest)
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


def show_pair(shown: dict[str, Any], out: Console) -> None:
    """Print the result of report.inspect.describe_pair."""
    of = f"source {shown['source']}" if "source" in shown else "the data"
    out.print(f"Pair {shown['pair']} (row {shown['source_row']} of {of})")
    for name, text in shown["text"].items():
        out.print(f"\n── {name}, {shown['tokens'][name]} tokens " + "─" * 40)
        out.print(text)
    if "logp" not in shown:
        out.print("\nNo reference values: the block is not scored yet, or they are non-finite.")
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


_PART_STYLES = {"prompt": "bright_black", "chosen": "green", "rejected": "red"}


def _source(number: int, source: dict[str, Any]) -> str:
    """A source of a mixture, on one line."""
    margin = source["margin"]
    mean = "" if margin is None else f", mean margin {margin:.4f}"
    weight = f", weight {source['weight']:g}" if "weight" in source else ""
    split = f" {source['split']}" if source["split"] else ""
    return (
        f"{number}: {source['source']}{_at(source['revision'])}{split}{weight}: "
        f"{source['pairs']:,} pairs, {source['share']:.1%}{mean}"
    )


def show_preview(shown: dict[str, Any], out: Console) -> None:
    """Print the result of caching.preview.preview."""
    for pair in shown["pairs"]:
        out.print(f"{pair['place']}, layout: {pair['layout']}", style="bold")
        for name, part in pair["parts"].items():
            scored = "scored" if part["scored"] else "not scored"
            cut = ", truncated" if part["truncated"] else ""
            out.print(f"── {name}, {part['tokens']} tokens, {scored}{cut}")
            text = Text()
            for piece in part["pieces"]:
                style = _PART_STYLES[name]
                text.append(piece["text"], f"{style} reverse" if piece["special"] else style)
            out.print(text)
        out.print()
    layouts = ", ".join(f"{count:,} {name}" for name, count in shown["layouts"].items())
    out.print(f"template: {shown['template']}; reversed colours are special tokens")
    out.print(f"layouts: {layouts}")
    out.print(f"{shown['kept']:,} pairs of the first {shown['read']:,} rows")
    if left := shown["read"] - shown["kept"] - sum(shown["dropped"].values()):
        out.print(f"left out {left:,}: by the weights, as one source ends first")
    for reason, count in shown["dropped"].items():
        out.print(f"dropped {count:,}: {reason}")


def _show_verified(shown: dict[str, Any], out: Console) -> None:
    if verified := shown.get("verified"):
        out.print(
            f"\nVerified {verified['blocks']} blocks ({verified['gaps']} not written yet): "
            "no damage"
        )


def show_evaluation(result: dict[str, Any], out: Console) -> None:
    """Print the result of evaluation.evaluate."""
    method = f", trained with {result['method']}" if result["method"] else ""
    out.print(f"{result['model']}{method}: {result['pairs']:,} pairs, split {result['split']}\n")
    table = Table("", "", "standard error", "ties", box=None, header_style="")
    for title, name, of in (
        ("accuracy, log-probability per token", "accuracy", "share"),
        ("accuracy, implicit reward S - S_ref", "reward_accuracy", "share"),
        ("accuracy, reward per token", "reward_accuracy_per_token", "share"),
        ("margin, nats per token", "margin_per_token", "mean"),
        ("reward margin, nats", "reward_margin", "mean"),
        ("reward margin, nats per token", "reward_margin_per_token", "mean"),
    ):
        value = result[name]
        parts = [_number(value[part], ".4f") for part in (of, "standard_error")]
        table.add_row(title, *parts, f"{value['ties']:.0%}" if "ties" in value else "")
    out.print(table)
    table = Table("", "chosen", "rejected", "|margin|", box=None, header_style="")
    rows = {"perplexity": result["perplexity"]}
    rows |= {f"D, {site}": value for site, value in result.get("distance", {}).items()}
    rows |= {f"D of group {name}": value for name, value in result.get("groups", {}).items()}
    if "kl" in result:
        bound = ", lower bound by the store" if result["kl_from"] == "store" else ""
        rows[f"sequential KL, nats{bound}"] = result["kl"]
        rows["per token"] = result["kl_per_token"]
    for title, value in rows.items():
        cells = [value["chosen"], value["rejected"], value.get("margin")]
        table.add_row(title, *("" if cell is None else f"{cell:.5g}" for cell in cells))
    out.print()
    out.print(table)
    for site, found in result.get("consistency", {}).items():
        over = ", ".join(
            f"{name} {_number(value['pearson'])} (Spearman {_number(value['spearman'])})"
            for name, value in found.items()
        )
        out.print(f"\nCorrelation of D and KL at {site}, over {over}")
    if found := result.get("kl_of_store"):
        out.print(
            f"\nThe store's distributions give {_number(found['share'], '.1%')} of the KL; "
            f"correlation over responses {_number(found['responses']['pearson'])}, over margins "
            f"{_number(found['margins']['pearson'])}"
        )
    for site, found in result.get("bound", {}).items():
        out.print(
            f"Appendix B's bound at {site}: {found['bound_per_token']:.3g} nats per token, KL "
            f"{found['kl_per_token']:.3g}; it holds for {found['kept']:.0%} of responses"
        )
    if sampled := result.get("generation"):
        heads = {
            "prompts": "prompts", "temperature": "temp.", "responses": "answers",
            "tokens": "tokens", "ended": "ended", "entropy": "entropy",
            "distinct_1": "distinct-1", "distinct_2": "-2", "distinct_3": "-3",
        }  # fmt: skip
        table = Table(*heads.values(), box=None, header_style="")
        for row in sampled:
            known = {name: value for name, value in row.items() if value is not None}
            known = {"temperature": "by category"} | known
            table.add_row(*(_number(known.get(name)) for name in heads))
        out.print("\nSamples (entropy in nats per token)")
        out.print(table)


def _number(value: float | str | None, form: str = ".4g") -> str:
    if isinstance(value, str):
        return value
    return "-" if value is None else f"{value:{form}}"


def _kept(about: dict[str, Any]) -> str:
    kept = about.get("keep", [])
    return f", {len(kept)} in every response" if kept else ""


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
