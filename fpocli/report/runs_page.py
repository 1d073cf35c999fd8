"""The page of fpo report: its charts and its contents."""

from pathlib import Path
from typing import Any

from markupsafe import Markup

from fpocli.display.page import write_page
from fpocli.display.page_charts import Curve, curves, histogram
from fpocli.system.console import say

# Metrics by heading, with caption and unit. docs/method.md defines them.
_METRICS: dict[str, dict[str, tuple[str, str]]] = {
    "Loss": {
        "loss": ("Loss", "nats"),
        "u": ("u, the argument of the sigmoid", "u"),
        "delta": ("δ, the constraint inside u", "δ"),
        "router_aux_loss": ("Auxiliary loss of the routers", "loss"),
    },
    "Rewards and accuracy": {
        "margin": ("Reward margin", "margin"),
        "reward_chosen": ("Reward, chosen", "reward"),
        "reward_rejected": ("Reward, rejected", "reward"),
        "accuracy": ("Accuracy, log-probability per token", "share of pairs"),
        "reward_accuracy": ("Accuracy, the method’s reward", "share of pairs"),
        "average_logp_chosen": ("Log-probability per token, chosen", "nats per token"),
        "average_logp_rejected": ("Log-probability per token, rejected", "nats per token"),
    },
    "Distance from the reference": {
        "distance_chosen": ("D, chosen", "SAE unit²"),
        "distance_rejected": ("D, rejected", "SAE unit²"),
        "missing": ("Compared features that the store lacks", "share"),
        "overlap": ("Top features that both models share", "share"),
        "kl_chosen": ("Sequential KL, chosen", "nats"),
        "kl_rejected": ("Sequential KL, rejected", "nats"),
        "kl_margin": ("Sequential KL, |rejected − chosen|", "nats"),
    },
    "Optimisation, speed and memory": {
        "gradient_norm": ("Gradient norm, before clipping", "norm"),
        "lr": ("Learning rate", "learning rate"),
        "tokens_per_second": ("Speed", "tokens per second"),
        "data_wait": ("Waiting for the store", "share of time"),
        "memory_gb": ("Memory of the step", "10⁹ bytes"),
    },
}
_GROUPS = "Groups of named features"
_OTHER = "Other metrics"
# Shown in sums above, or in no chart.
_LEFT_OUT = ("logp_chosen", "logp_rejected", "reward_ties", "tokens", "seconds", "peak_memory_gb")


def write_runs_page(shown: dict[str, Any], file: Path) -> None:
    """Write the page.

    Args:
        shown: from runs.describe_runs.
        file: HTML.
    """
    charts = _curve_charts(shown["curves"])
    margins = _margin_chart(shown)
    contents = {
        **({"differing": "Settings that differ"} if shown["differing"] else {}),
        "runs": "Runs",
        **({"curves": "Curves"} if charts else {}),
        **({"held-out": "Held-out pairs, before and after"} if shown["held_out"] else {}),
        **({"evaluation": "Evaluation"} if shown["evaluation"] else {}),
        **({"features": "Features that training changed"} if shown["changed_features"] else {}),
        **({"samples": "Samples"} if shown["samples"] else {}),
        "settings": "All settings",
    }
    write_page(file, "runs.html", contents=contents, report=shown, charts=charts, margins=margins)
    say(f"the page is in {file}")


def _curve_charts(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[tuple[str, Markup]]]:
    """By heading the caption and chart of each metric."""
    headings = {name: dict(metrics) for name, metrics in _METRICS.items()}
    known = {name for metrics in _METRICS.values() for name in metrics} | {*_LEFT_OUT}
    for name in found:
        if name.startswith("group."):
            caption = name.removeprefix("group.").replace(".", ", ").replace("_", " ")
            unit = "share of D" if ".share_" in name else "SAE unit²"
            headings.setdefault(_GROUPS, {})[name] = caption, unit
        elif name not in known:
            headings.setdefault(_OTHER, {})[name] = name, "value"
    charts: dict[str, list[tuple[str, Markup]]] = {}
    for heading, metrics in headings.items():
        for metric, (caption, unit) in metrics.items():
            if metric in found:
                name = f"curve-{sum(map(len, charts.values()))}"
                svg = _curve_chart(found[metric], name, caption, unit)
                charts.setdefault(heading, []).append((caption, svg))
    return charts


def _curve_chart(lines: list[dict[str, Any]], name: str, caption: str, unit: str) -> Markup:
    drawn = [Curve(one["step"], one["value"], one["run"], one["split"] == "eval") for one in lines]
    return Markup(curves(drawn, name, f"{caption}, over the steps", unit))


def _margin_chart(shown: dict[str, Any]) -> Markup | None:
    margins = shown["reward_margins"]
    if margins is None:
        return None
    return Markup(
        histogram(
            margins["edges"],
            margins["counts"],
            "reward-margins",
            "Histogram of the reward margins of the evaluated pairs, by run",
            ("reward margin (nats per token)", "pairs"),
        )
    )
