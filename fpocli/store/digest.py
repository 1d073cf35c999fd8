"""Digests: 64 bits of a sha256 over what a block or pair holds (docs/format.md, The digests)."""

import hashlib

import numpy as np

from fpocli.data.top_tokens import TopTokens
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs


def digest_of_block(tokens: TokenPairs, reference: ReferenceValues) -> np.uint64:
    """64 bits of sha256 over the decoded content of a block; never 0, which means not scored."""
    arrays = [tokens.ids, np.diff(tokens.spans), tokens.source_row]
    arrays += [reference.logp, reference.margin]
    for site in sorted(reference.features):
        features = reference.features[site]
        arrays += [features.index, features.value, features.nonzero]
    return _digest(arrays)


def digest_of_totals(block: int, totals: dict[str, FeatureTotals]) -> np.uint64:
    """64 bits of sha256 over a block's number and totals; never 0."""
    arrays = [np.array(block, np.int64)]
    for site in sorted(totals):
        arrays += [totals[site].value, totals[site].frequency]
    return _digest(arrays)


def digest_of_kept(block: int, reference: ReferenceValues) -> np.uint64:
    """64 bits of sha256 over a block's number and its values of the features that are always
    stored; never 0."""
    kept = [reference.features[site].kept_value for site in sorted(reference.features)]
    return _digest([np.array(block, np.int64), *(values for values in kept if values.size)])


def digest_of_distributions(fingerprint: str, pair: int, top: TopTokens[np.ndarray]) -> np.uint64:
    """64 bits of sha256 over a store's fingerprint, a pair's number and its distributions as they
    are stored; never 0. With the first two, a pair is checked by itself."""
    name = np.frombuffer(fingerprint.encode("ascii"), np.uint8)
    stored = [values for values in top if values is not None]
    return _digest([name, np.array(pair, np.int64), *stored])


def hash_of_sources(source: np.ndarray) -> str:
    """sha256 over the sources of all pairs of a mixture, uint16 [N]."""
    return hashlib.sha256(source.astype("<u2").tobytes()).hexdigest()


def _digest(arrays: list[np.ndarray]) -> np.uint64:
    digest = hashlib.sha256()
    for array in arrays:
        little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        digest.update(little.tobytes())
    return np.uint64(int.from_bytes(digest.digest()[:8], "little") or 1)
