"""fpo cache --reference-logps: log-probabilities of the reference that another program computed.

The data set in which TRL's DPO trainer precomputes them, any table with its two columns, and the
cache of open-instruct, a file `.pt`. Row i of the file belongs to row i of the data.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from fpocli.caching.block_scorer import BlockScorer
from fpocli.caching.score_block import ScoredBlock
from fpocli.config import CacheConfig
from fpocli.data.sources import open_source
from fpocli.scoring.rounding import LARGEST_GAP, LARGEST_GAP_OF_DTYPES
from fpocli.store.reader import Store
from fpocli.store.records import ReferenceValues, TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.errors import UserError
from fpocli.system.files import sha256_of

# Columns of a table, and tensors of open-instruct.
_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
_TENSORS = ("chosen_logps", "rejected_logps")
# Pairs that are scored to see whether the values are those of the model: the longest, which would
# be truncated, and others from everywhere.
_LONGEST, _OTHERS = 4, 12


class ImportedReference:
    """The values of a file, in memory.

    Args:
        config: names the file, and says whether it holds averages per token.

    Raises:
        UserError: the file cannot be read, or holds no log-probabilities.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._config, file = config, str(config.reference_logps)
        if file.endswith(".pt"):
            self._values, fingerprint = _read_tensors(Path(file)), sha256_of(Path(file))
        else:
            source = open_source(file, config.split[0] if config.split else None, None)
            rows = [_of_row(row, place) for place, row in source.rows()]
            self._values = np.array(rows, np.float32).reshape(-1, 2)
            fingerprint = source.identity["fingerprint"]
        if len(above := np.argwhere(self._values > 0)):
            row = int(above[0, 0])
            raise UserError(
                f"{file} has {self._values[row].max():.3g} in row {row}, and no log-probability is "
                "above 0",
                "name the file with the reference's log-probabilities",
            )
        self.identity = {
            "source": file,
            "fingerprint": fingerprint,
            "reduction": "mean" if config.reference_averages else "sum",
        }

    def check(self, store: Store, scorer: BlockScorer, bar: Bar) -> str:
        """Score some pairs and compare.

        Args:
            store: with the token ids of all pairs.
            scorer: of the reference.
            bar: advanced by the pairs that are scored.

        Returns:
            how far they are apart, in words.

        Raises:
            UserError: by more than rounding, or the file has another number of rows than the data.
        """
        file, rows = self._config.reference_logps, store.meta["pairs"]["read"]
        if len(self._values) < rows or (len(self._values) > rows and not self._config.limit):
            raise UserError(
                f"{file} has {len(self._values):,} rows, and the data {rows:,}",
                "name the data that it was made from; its row i belongs to row i of --data",
            )
        sample = _sample(store, np.isfinite(self._values).all(1))
        own = scorer.score(sample, bar).reference.logp
        known = np.isfinite(own)
        sums, averages = (
            float(abs(own - values)[known].sum() / sample.counts[known].sum())
            for values in (self._values_of(sample), self._values_of(sample, other=True))
        )
        found = f"{sums:.2g} nats per token apart"
        most = LARGEST_GAP[self._config.dtype]
        if "dtype" in self._config.allow:
            most = LARGEST_GAP_OF_DTYPES
        # Written so that nan fails the comparison.
        if not sums <= most:
            flag = "--reference-averages"
            hint = f"leave out {flag}" if self._config.reference_averages else f"add {flag}"
            held = "sums" if self._config.reference_averages else "averages per token"
            raise UserError(
                f"the log-probabilities in {file} are not those of {self._config.model} on these "
                f"tokens: {found} on {len(sample)} pairs",
                f"they are {held}: {hint}"
                if averages <= most
                else "other weights, another --dtype, template or --max-length, or rows in another "
                "order give others; --allow dtype permits the rounding of another dtype",
            )
        return f"{found} from this model's own on {len(sample)} pairs"

    def score(self, tokens: TokenPairs, bar: Bar) -> ScoredBlock:
        """What a block holds of the reference: the file's values of its pairs.

        Raises:
            UserError: one is non-finite.
        """
        logp = self._values_of(tokens)
        missing = ~np.isfinite(logp).all(1)
        places = [tokens.place(pair) for pair in np.flatnonzero(missing).tolist()]
        if places and not self._config.drop_non_finite:
            raise UserError(
                f"{self._config.reference_logps} has no finite value in {places[0]}",
                "drop such pairs with --drop-non-finite",
            )
        logp[missing] = np.nan
        average = logp / tokens.counts.astype(np.float32)
        bar.advance(len(tokens), pairs=len(tokens), tokens=len(tokens.ids))
        values = ReferenceValues(logp, average[:, 0] - average[:, 1], {})
        return ScoredBlock(values, {}, None, places, len(tokens.ids))

    def _values_of(self, tokens: TokenPairs, *, other: bool = False) -> np.ndarray:
        """S_ref of pairs, float32 [b, 2]; with `other` as if the file held averages and not sums,
        or sums and not averages."""
        values = self._values[tokens.source_row]
        averages = self._config.reference_averages != other
        return values * tokens.counts.astype(np.float32) if averages else values


def _sample(store: Store, finite: np.ndarray) -> TokenPairs:
    """Pairs whose values are finite; any, if there are none.

    Args:
        store: with the token ids of all pairs.
        finite: bool, of each row of the file.
    """
    spans, rows = store.read_array("spans"), store.read_array("source_row")
    usable = np.flatnonzero(finite[rows])
    if not len(usable):
        usable = np.arange(store.pairs)
    longest = np.argsort((spans[:, 0] - spans[:, 3])[usable], kind="stable")[:_LONGEST]
    others = np.linspace(0, len(usable) - 1, _OTHERS).astype(int)
    chosen = usable[np.unique(np.concatenate([longest, others]))]
    return TokenPairs.of([store.pair(pair) for pair in chosen.tolist()])


def _of_row(row: Any, place: str) -> list[float]:
    if not isinstance(row, dict) or not set(_COLUMNS) <= row.keys():
        raise UserError(
            f"{place} has no columns {' and '.join(_COLUMNS)}",
            "name the data set that TRL's DPO trainer has with precompute_ref_log_probs, or "
            "open-instruct's cache, a file .pt",
        )
    # A missing value is one that is not finite.
    values = [np.nan if row[name] is None else row[name] for name in _COLUMNS]
    try:
        if all(isinstance(value, (int, float)) for value in values):
            return [float(value) for value in values]
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise UserError(
        f"{place}: the values of {' and '.join(_COLUMNS)} are no numbers",
        "write a log-probability in nats for each",
    )


def _read_tensors(file: Path) -> np.ndarray:
    try:
        # Tensors alone, never code.
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file} does not exist", "check --reference-logps") from error
    except Exception as error:  # torch's unpickler raises errors of many kinds
        raise UserError(
            f"{file} is no file of tensors: {str(error).partition('.')[0]}", "copy it again"
        ) from error
    named = found if isinstance(found, dict) else {}
    parts = [part for name in _TENSORS if isinstance(part := named.get(name), torch.Tensor)]
    if len(parts) < 2 or parts[0].ndim != 1 or parts[0].shape != parts[1].shape:
        raise UserError(
            f"{file} does not hold {' and '.join(_TENSORS)}, a number for each row",
            "name the cache that open-instruct writes to reference_logprobs_cache",
        )
    try:
        return torch.stack(parts, 1).detach().float().numpy()
    except (TypeError, RuntimeError) as error:
        raise UserError(
            f"{file} holds tensors without plain values: {error}", "save dense ones"
        ) from error
