"""fpo features diff: what training did to the model, feature by feature.

The change of a pair is policy minus reference, the mean over its two responses, from features.npz
of fpo eval.

Shapes: N pairs, m features.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fpocli.config import DiffConfig
from fpocli.display.feature_tables import show_diff
from fpocli.evaluation.evaluate import run_folder
from fpocli.evaluation.feature_changes import FeatureChanges, read_changes
from fpocli.features.site import Site
from fpocli.interpretation.activations import load_model_and_sae
from fpocli.interpretation.contexts import find_contexts
from fpocli.interpretation.labels import neuronpedia_page, read_labels
from fpocli.interpretation.paired_test import correct, sign_flip_p
from fpocli.model.network import choose_device
from fpocli.scoring.loading import tokenizer_of
from fpocli.store.reader import Store
from fpocli.system.console import data_console
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_json
from fpocli.system.model_folder import find_model


@dataclass(frozen=True)
class Evaluated:
    """A run, and what fpo eval measured of its features.

    Args:
        name: as the user typed it.
        result: the content of eval.json.
        pairs: int64 [N], their numbers in the store.
        sites: the changes at each site.
    """

    name: str
    result: dict[str, Any]
    pairs: np.ndarray
    sites: dict[str, FeatureChanges]

    def has_pairs_of(self, other: "Evaluated") -> bool:
        """Whether both were evaluated on the same pairs."""
        stores = {run.result["store"]["fingerprint"] for run in (self, other)}
        return len(stores) == 1 and np.array_equal(self.pairs, other.pairs)


@dataclass(frozen=True)
class MeanChange:
    """The mean change of every feature over N pairs: float64 [m] each.

    Args:
        mean: policy minus reference.
        error: its standard error over pairs.
        chosen, rejected: the mean change of these responses alone.
        before, after: mean value of the reference and of the policy, cut as in the store.
        q: of the test that nothing changed, corrected for all features.
    """

    mean: np.ndarray
    error: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    before: np.ndarray
    after: np.ndarray
    q: np.ndarray


def diff(config: DiffConfig) -> dict[str, Any]:
    """What training changed, feature by feature, in one run or several; printed as a table.

    Args:
        config: the settings.

    Returns:
        `runs`, how many features rose and fell in each; `features`, those that changed most, with
        the change in each run and contexts.

    Raises:
        UserError: a run was not evaluated, or the runs were evaluated on different pairs.
    """
    runs = [read_evaluated(name) for name in config.runs]
    site = common_site(runs, config.at)
    store = None
    if config.contexts or config.labels:
        store = _open_store(config, runs)
    source = store.neuronpedia(site) if store else None
    labels = read_labels(config.labels, source) if config.labels else {}
    result = compare_changes(runs, site, config.rate, config.top)
    for row in result["features"]:
        row["label"] = labels.get(row["feature"])
        row["page"] = neuronpedia_page(source, row["feature"])
        row["contexts"] = []
    if store and config.contexts:
        _add_contexts(config, store, Site.parse(site), runs, result["features"])
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show_diff(result, data_console())
    return result


def read_evaluated(name: str) -> Evaluated:
    """What fpo eval wrote about a run: in its folder's `eval`, or in the named folder itself.

    Raises:
        UserError: there is no such folder, the run was not evaluated, or the files are damaged.
    """
    if not Path(name).is_dir():
        raise UserError(f"{name} is not a folder", "name the folder of a run of fpo train")
    run = run_folder(name)
    folder = run / "eval" if run else Path(name)
    pairs, sites = read_changes(folder / "features.npz")
    result = read_json(folder / "eval.json")
    if not isinstance(result, dict) or not isinstance(result.get("store"), dict):
        raise UserError(f"{folder / 'eval.json'} is damaged", "measure again with `fpo eval`")
    return Evaluated(name, result, pairs, sites)


def common_site(runs: list[Evaluated], name: str | None) -> str:
    """The site that is compared.

    Raises:
        UserError: the runs have none in common or several, or were evaluated on different pairs.
    """
    first = runs[0]
    for run in runs[1:]:
        if not run.has_pairs_of(first):
            raise UserError(
                f"{run.name} and {first.name} were evaluated on different pairs",
                "evaluate them with the same --cache and --split",
            )
    common = [site for site in first.sites if all(site in run.sites for run in runs)]
    if name and name not in common:
        raise UserError(
            f"the features of {name} were not measured",
            f"measured were {', '.join(common) or 'none'}",
        )
    if not name and len(common) != 1:
        raise UserError(
            "several sites were measured" if common else "no features were measured",
            f"name one with --at: {', '.join(common)}" if common else "use a store with features",
        )
    return name or common[0]


def compare_changes(runs: list[Evaluated], site: str, rate: float, top: int) -> dict[str, Any]:
    """The mean changes of runs side by side.

    Args:
        runs: evaluated on the same pairs.
        site: of the features.
        rate: the most false findings among the features that changed, as a share.
        top: how many features are listed: those that changed most in any run, relative to the
            standard error.
    """
    changes = [mean_change(run.sites[site]) for run in runs]
    with np.errstate(divide="ignore", invalid="ignore"):
        scores = [np.nan_to_num(np.abs(one.mean) / one.error) for one in changes]
    found = [one.q <= rate for one in changes]
    # First what changed beyond the noise.
    score = np.max([s + 1e6 * f for s, f in zip(scores, found, strict=True)], axis=0)
    order = np.argsort(-score, kind="stable")[:top]
    return {
        "site": site,
        "pairs": len(runs[0].pairs),
        "rate": rate,
        "runs": [
            {
                "run": run.name,
                "method": run.result.get("method"),
                "rose": int((which & (one.mean > 0)).sum()),
                "fell": int((which & (one.mean < 0)).sum()),
                "sum_of_squares": float((one.mean**2).sum()),
            }
            for run, one, which in zip(runs, changes, found, strict=True)
        ],
        "features": [
            {
                "feature": int(feature),
                "runs": [
                    {name: float(values[feature]) for name, values in vars(one).items()}
                    for one in changes
                ],
            }
            for feature in order
            if score[feature] > 0
        ],
    }


def mean_change(changes: FeatureChanges) -> MeanChange:
    """The mean change of every feature, and whether it is beyond the noise of pairs.

    The test is that of fpo features contrast: if training changed nothing systematically, policy
    and reference could be exchanged in any pair.
    """
    chosen, rejected, before = changes.means()
    of_pairs = (changes.change[::2] + changes.change[1::2]) / 2
    n = of_pairs.shape[0]
    total, squares = of_pairs.sum(0), of_pairs.power(2).sum(0)
    mean = total / n
    variance = np.maximum(squares / n - mean**2, 0)
    return MeanChange(
        mean=mean,
        error=np.sqrt(variance / max(1, n - 1)),
        chosen=chosen,
        rejected=rejected,
        before=before,
        after=before + mean,
        q=correct(sign_flip_p(total, squares), squares > 0),
    )


def _open_store(config: DiffConfig, runs: list[Evaluated]) -> Store:
    known = runs[0].result["store"]
    store = Store.open(config.cache or known["path"])
    if store.meta["fingerprint"] != known["fingerprint"]:
        raise UserError(
            f"{store.path} is not the store that {runs[0].name} was evaluated on",
            "name that store with --cache, or use --contexts 0",
        )
    return store


def _add_contexts(
    config: DiffConfig,
    store: Store,
    site: Site,
    runs: list[Evaluated],
    features: list[dict[str, Any]],
) -> None:
    """Add to each feature the tokens it fires on in the policy that changed it most, in the
    responses in which it changed most."""
    device = choose_device(config.device)
    for number, run in enumerate(runs):
        mine = [
            row
            for row in features
            if number == int(np.argmax([abs(one["mean"]) for one in row["runs"]]))
        ]
        if not mine:
            continue
        folder = find_model(run.result["model"], trust_remote_code=config.trust_remote_code)
        tokenizer = tokenizer_of(store, folder)
        model, encoder = load_model_and_sae(store, folder, site, config.sae, device)
        change = run.sites[str(site)].change.tocsc()
        # The responses of the store, two to a pair.
        numbers = np.column_stack([2 * run.pairs, 2 * run.pairs + 1]).ravel()
        wanted = {}
        for row in mine:
            column = change[:, [row["feature"]]].toarray().ravel()
            most = np.argsort(-np.abs(column))[: config.contexts]
            wanted[row["feature"]] = numbers[most].tolist()
        found = find_contexts(model, encoder, tokenizer, store.pair, wanted)
        for row in mine:
            row["contexts"] = [
                {"run": run.name, "pair": response // 2, **one}
                for response, one in zip(wanted[row["feature"]], found[row["feature"]], strict=True)
            ]
