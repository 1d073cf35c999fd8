"""fpo features find: the features of a kind of text (paper, section 5.3), as a weights file.

Shapes: R target texts, B texts of the background, m features.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fpocli.config import CacheConfig, FindConfig
from fpocli.data.dropped import DroppedRows
from fpocli.data.pair_tokenizer import PairTokenizer
from fpocli.data.pairs import TokenPair
from fpocli.data.texts import read_texts
from fpocli.display.contexts import context_text
from fpocli.display.feature_tables import show_found
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.interpretation.activations import Peaks, peaks
from fpocli.interpretation.contexts import find_contexts
from fpocli.interpretation.group_file import add_group, require_no_group
from fpocli.interpretation.labels import neuronpedia_page, read_labels
from fpocli.interpretation.permutation_test import larger_p
from fpocli.model.language_model import LanguageModel, check_layers, load_model
from fpocli.model.network import choose_device, read_config
from fpocli.scoring.loading import tokenizer_of
from fpocli.scoring.saes import choose_default_saes, load_saes
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.system.console import data_console, say
from fpocli.system.errors import UserError
from fpocli.system.json_yaml import json_number
from fpocli.system.model_folder import ModelFolder, find_model


class Texts(NamedTuple):
    """Texts as the responses of pairs.

    Args:
        pairs: their token ids.
        counted: bool, for each of the 2P responses whether it is one of the texts.
    """

    pairs: list[TokenPair]
    counted: np.ndarray


class Finding(NamedTuple):
    """The features of a kind of text, the most specific first: int64 or float [F] for F features.

    Args:
        feature: its index.
        mean, background_mean: of the pooled activation over the target texts, the background.
        peak, background_peak: mean over the texts of the largest activation at a single token.
        share, background_share: of the texts in which it is > 0.
        effect: difference of the means, in standard deviations; NaN without a background.
        p: of the test that it is not larger in the target texts, corrected for all features; NaN
            without a background.
    """

    feature: np.ndarray
    mean: np.ndarray
    background_mean: np.ndarray
    peak: np.ndarray
    background_peak: np.ndarray
    share: np.ndarray
    background_share: np.ndarray
    effect: np.ndarray
    p: np.ndarray


def find(config: FindConfig) -> dict[str, Any]:
    """Find the features of a kind of text, write them as a group of a weights file, and print them.

    Args:
        config: the settings.

    Returns:
        what was found; `features` has one record each, with its contexts.

    Raises:
        UserError: the model, SAE, texts or weights file cannot be used.
    """
    # -- files, before anything large is read ----------------------------------------------------
    group = config.group or Path(config.target).stem
    site = Site(config.layer, config.site)
    require_no_group(Path(config.out), str(site), group)
    device = choose_device(config.device)
    trust = config.trust_remote_code
    folder = find_model(config.model, trust_remote_code=trust)
    model_config = read_config(folder)
    check_layers(model_config, [site])
    tokenizer = PairTokenizer(
        folder,
        config.chat_template,
        CacheConfig.max_length,
        CacheConfig.max_prompt_length,
        DroppedRows(),
    )
    target = _texts(tokenizer, config.target, config.limit)
    background = None
    if config.against:
        background = _background(tokenizer, config, folder)
    else:
        say("note: without --against, features that fire on any text are found as well")
    # -- every feature's activations on all texts ------------------------------------------------
    sources = [config.sae] if config.sae else choose_default_saes(folder, model_config, [site])
    (encoder,) = load_saes(sources, [site], model_config.hidden_size, device).values()
    labels = read_labels(config.labels, encoder.neuronpedia) if config.labels else {}
    model = load_model(folder, [site], getattr(torch, config.dtype), device).eval()
    check_against_transformers(model, TokenPairs.of(target.pairs))
    on_target = _peaks(config, model, encoder, target)
    on_background = _peaks(config, model, encoder, background) if background else None
    # -- the two steps, and what the features fire on ---------------------------------------------
    found = select(on_target, on_background, config.candidates, config.rate)
    found = Finding(*(values[: config.top] for values in found))
    contexts = _contexts(config, model, encoder, tokenizer.tokenizer, target, on_target, found)
    result = {
        "model": folder.source,
        "site": str(site),
        "sae": sources[0],
        "target": config.target,
        "texts": len(on_target.pooled),
        "against": config.against,
        "background_texts": len(on_background.pooled) if on_background else 0,
        "rate": config.rate,
        "group": group,
        "out": config.out,
        "features": [
            {name: json_number(values[row]) for name, values in found._asdict().items()}
            | {
                "feature": int(feature),
                "label": labels.get(int(feature)),
                "page": neuronpedia_page(encoder.neuronpedia, int(feature)),
                "contexts": contexts[row],
            }
            for row, feature in enumerate(found.feature)
        ],
    }
    _write(result)
    if config.json:
        print(json.dumps(result, indent=2))
    else:
        show_found(result, data_console())
    return result


def select(target: Peaks, background: Peaks | None, candidates: int, rate: float) -> Finding:
    """The paper's two steps: candidates by the activation on single tokens, then those whose mean
    activation over the whole target set is above the background's.

    Both compare the target with the background: by size alone, features that fire everywhere would
    come first. The second step is a test of rank sums of the pooled activations, corrected for all
    features and not for the candidates alone, as these were chosen on the same texts.

    Args:
        target: of R texts.
        background: of B texts; None compares with 0 and tests nothing.
        candidates: number of features that the first step keeps.
        rate: the highest chance that any feature found is a false one.

    Returns:
        the features that are left, by falling effect size; without a background by falling mean.
    """
    other = background or Peaks(*(np.zeros_like(values) for values in vars(target).values()))
    peak, other_peak = target.peak.mean(0), other.peak.mean(0)
    lead = peak - other_peak
    first = np.argsort(-lead, kind="stable")[:candidates]
    mean, other_mean = target.pooled.mean(0), other.pooled.mean(0)
    if background:
        spread = np.sqrt((target.pooled.var(0, ddof=1) + other.pooled.var(0, ddof=1)) / 2)
        # Infinite where all values of both sides are equal among themselves.
        with np.errstate(divide="ignore", invalid="ignore"):
            effect = (mean - other_mean) / spread
        p, score = larger_p(target.pooled, other.pooled), effect
    else:
        effect, p, score = np.full_like(mean, np.nan), np.full_like(mean, np.nan), mean
    ranked = first[np.argsort(-score[first], kind="stable")]
    ranked = ranked[(mean[ranked] > other_mean[ranked]) & (lead[ranked] > 0)]
    # Without a background nothing is tested.
    ranked = ranked[~(p[ranked] > rate)]
    shares = [(values.pooled > 0).mean(0) for values in (target, other)]
    columns = (mean, other_mean, peak, other_peak, *shares, effect, p)
    return Finding(ranked, *(values[ranked] for values in columns))


def _texts(tokenizer: PairTokenizer, data: str, limit: int) -> Texts:
    read = read_texts(data, limit)
    dropped = tokenizer.dropped = DroppedRows()
    dropped.read = len(read)
    pairs = list(tokenizer(text.pair for text in read))
    if not pairs:
        raise dropped.nothing_left()
    if dropped.counts:
        say(f"note: texts of {data} are left out: {dropped}")
    counted = np.array([[True, read[pair.row].texts == 2] for pair in pairs]).ravel()
    if counted.sum() < 2:
        raise UserError(f"{data} holds a single text", "two or more are needed")
    return Texts(pairs, counted)


def _background(tokenizer: PairTokenizer, config: FindConfig, folder: ModelFolder) -> Texts:
    """The texts of --against: a data set, or the responses of a store."""
    path = Path(str(config.against))
    if not (path / "zarr.json").is_file():
        return _texts(tokenizer, str(path), config.limit)
    store = Store.open(path)
    tokenizer_of(store, folder)
    pairs: list[TokenPair] = []
    for block in range(store.blocks):
        tokens = store.tokens(block)
        pairs += [tokens.pair(row) for row in range(len(tokens))]
        if 2 * len(pairs) >= config.limit:
            break
    pairs = pairs[: (config.limit + 1) // 2]
    return Texts(pairs, np.ones(2 * len(pairs), bool))


def _peaks(config: FindConfig, model: LanguageModel, encoder: SparseEncoder, texts: Texts) -> Peaks:
    found = peaks(model, encoder, texts.pairs, config.packed_length)
    return Peaks(found.pooled[texts.counted], found.peak[texts.counted])


def _contexts(
    config: FindConfig,
    model: LanguageModel,
    encoder: SparseEncoder,
    tokenizer: Any,
    target: Texts,
    on_target: Peaks,
    found: Finding,
) -> list[list[dict[str, Any]]]:
    """For each feature the contexts of its largest activations, of different texts."""
    responses = np.flatnonzero(target.counted)
    highest = np.argsort(-on_target.peak[:, found.feature], axis=0, kind="stable")
    chosen = responses[highest[: config.contexts]]  # [contexts, features]
    wanted = dict(zip(found.feature.tolist(), chosen.T.tolist(), strict=True))
    shown = find_contexts(
        model, encoder, tokenizer, target.pairs.__getitem__, wanted, config.packed_length
    )
    return [[one for one in contexts if one["peak"] > 0] for contexts in shown.values()]


def _write(result: dict[str, Any]) -> None:
    """The weights file: one group, each feature with what it fires on as a comment."""
    if not result["features"]:
        say("no feature was found, so no weights file is written")
        return
    notes = {
        one["feature"]: one["label"]
        or (context_text(one["contexts"][0]) if one["contexts"] else "")
        for one in result["features"]
    }
    add_group(Path(result["out"]), result["site"], result["group"], notes)
    say(f"the group {result['group']} is in {result['out']}")
