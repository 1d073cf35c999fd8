"""Scores one block of a store with the frozen reference: token ids in, reference values out.

Shapes: b pairs of the block, P pairs of a packed sequence, M scored positions of a block or packed
sequence, K stored features, m features, n tokens of a distribution.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch

from fpocli.data.top_tokens import TopTokens
from fpocli.features.encoder import SparseEncoder, top_k
from fpocli.features.top_features import TopFeatures
from fpocli.model.attention import length_multiple
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack, plan_packing
from fpocli.scoring.score import PairScores, score
from fpocli.store.distribution_rows import Distributions
from fpocli.store.missing import missing_distributions, missing_values
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.errors import UserError

NON_FINITE = "a log-probability or a feature of the pair in"


class ScoredBlock(NamedTuple):
    """What a block holds of the reference.

    Args:
        reference: the values of its b pairs.
        totals: by site, the sums over its responses.
        top: the distributions at its M scored positions, pair by pair; None in a store without.
        non_finite: where in the data the pairs are whose values were non-finite, and are missing.
        tokens: number of token ids of its pairs.
    """

    reference: ReferenceValues
    totals: dict[str, FeatureTotals]
    top: TopTokens[np.ndarray] | None
    non_finite: list[str]
    tokens: int


def score_block(
    model: LanguageModel,
    encoders: dict[str, SparseEncoder],
    meta: dict[str, Any],
    tokens: TokenPairs,
    packed_length: int,
    bar: Bar,
    *,
    drop_non_finite: bool = False,
    left_out: Collection[int] = (),
) -> ScoredBlock:
    """Compute the reference values of a block's pairs. They depend on nothing outside the block.

    Args:
        model: the reference.
        encoders: the SAE of each site.
        meta: attributes of the store: which features and distributions it has, and their dtypes.
        tokens: of the b pairs.
        packed_length: the most tokens of a packed sequence.
        bar: advanced by the pairs that are done.
        drop_non_finite: leave the values of a pair missing if one is non-finite.
        left_out: pairs whose values stay missing without being scored.

    Raises:
        UserError: a value is non-finite, or does not fit into float16.
    """
    values = missing_values(meta, len(tokens))
    totals = {
        site: FeatureTotals(np.zeros(encoder.features), np.zeros((2, encoder.features), np.int64))
        for site, encoder in encoders.items()
    }
    sizes = tokens.counts.sum(1)
    ends = sizes.cumsum()
    top = missing_distributions(meta, int(ends[-1]))
    distributions = Distributions.of(meta)
    n = distributions.n if distributions else 0
    device = model.network.device
    lengths = (tokens.spans[:, 3] - tokens.spans[:, 0]).tolist()
    scored = [pair for pair in range(len(tokens)) if pair not in left_out]
    plan = plan_packing([lengths[pair] for pair in scored], packed_length)
    packed = [[scored[place] for place in places] for places in plan]
    non_finite: list[str] = []
    for pairs in packed:
        batch = pack([tokens.pair(pair) for pair in pairs], length_multiple(device)).to(device)
        with torch.inference_mode():
            scores = score(model, encoders, batch, distributions=n)
        finite = _finite(scores)
        kept, wrong = (
            [pair for pair, ok in zip(pairs, finite.tolist(), strict=True) if ok is which]
            for which in (True, False)
        )
        if wrong and len(pairs) > 1:
            # A kernel may spread NaN to neighbours in the sequence, so each is scored by itself.
            packed += [[pair] for pair in wrong]
        elif wrong:
            place = tokens.place(wrong[0])
            if not drop_non_finite:
                raise UserError(
                    f"{NON_FINITE} {place} is non-finite",
                    "try --dtype float32, or drop the pair with --drop-non-finite",
                )
            non_finite.append(place)
            bar.advance()
        values.logp[kept] = scores.logp[finite].cpu().numpy()
        for site, pooled in scores.pooled.items():
            pooled = pooled[finite]
            _keep_features(pooled, values.features[site], kept, tokens)
            totals[site].value[:] += pooled.double().sum((0, 1)).cpu().numpy()
            totals[site].frequency[:] += (pooled > 0).sum(0).cpu().numpy()
        if top and scores.top and kept:
            rows = np.concatenate(
                [np.arange(ends[pair] - sizes[pair], ends[pair]) for pair in kept]
            )
            counts = torch.tensor(sizes[pairs], device=device)
            _keep_distributions(scores.top.at(finite.repeat_interleave(counts)), top, rows)
        bar.advance(len(kept), pairs=len(kept), tokens=sum(lengths[pair] for pair in kept))
    average = values.logp / tokens.counts.astype(np.float32)
    values.margin[:] = average[:, 0] - average[:, 1]
    return ScoredBlock(values, totals, top, non_finite, len(tokens.ids))


def _keep_features(
    pooled: torch.Tensor, into: TopFeatures, pairs: list[int], tokens: TokenPairs
) -> None:
    """The K largest of each response, and those that are stored for every one."""
    k = into.index.shape[-1]
    index, value = (tensor.cpu().numpy() for tensor in top_k(pooled, k))
    into.index[pairs] = np.where(value > 0, index, np.iinfo(into.index.dtype).max)
    # A value too large for float16 is among the K largest as well, and found there.
    with np.errstate(over="ignore"):
        into.value[pairs] = value
        into.kept_value[pairs] = pooled[..., into.kept].cpu().numpy()
    if not (fits := np.isfinite(into.value[pairs]).all((1, 2))).all():
        place = tokens.place(pairs[int(np.argmin(fits))])
        raise UserError(
            f"a pooled feature of the pair in {place} does not fit into float16: {value.max():.3g}",
            "use --value-dtype float32",
        )
    into.nonzero[pairs] = (pooled > 0).sum(-1).cpu().numpy()


def _keep_distributions(
    found: TopTokens[torch.Tensor], into: TopTokens[np.ndarray], rows: np.ndarray
) -> None:
    for own, values in zip(into, found, strict=True):
        if own is not None and values is not None:
            own[rows] = values.cpu().numpy()


def _finite(scores: PairScores) -> torch.Tensor:
    """Which pairs have finite values only: bool [P]."""
    finite = scores.logp.isfinite().all(1)
    for pooled in scores.pooled.values():
        finite &= pooled.isfinite().all(-1).all(1)
    if scores.top:
        # The other tokens together may have no probability.
        rest = scores.top.rest
        rows = scores.top.logp.isfinite().all(1) & (rest.isfinite() | rest.isneginf())
        counts = scores.count.sum(1).int().tolist()
        finite &= torch.stack([positions.all() for positions in rows.split(counts)])
    return finite
