"""Reads a store of version 1 (docs/format.md); writer.py writes it, schema.py describes it.

Shapes: N pairs, T tokens, K stored features, F features that are stored for every response,
m features of a site, B blocks, b pairs of one block.
"""

from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from fpocli.data.pairs import TokenPair
from fpocli.features.top_features import TopFeatures
from fpocli.store.array_reader import BROKEN
from fpocli.store.attributes import wrong_attribute
from fpocli.store.digest import digest_of_block, digest_of_kept, digest_of_totals
from fpocli.store.distribution_reader import DistributionReader
from fpocli.store.metadata import (
    DOCUMENT,
    REPAIR,
    array_document,
    check_documents,
    is_begun,
    read_root,
)
from fpocli.store.place import Place, place_of
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.store.schema import (
    FORMAT,
    VERSION,
    ArraySchema,
    array_schema,
    kept_features,
)
from fpocli.system.errors import UserError

# In this order; other codecs might hide damage.
_CODECS = "bytes, zstd, crc32c"
_SHARD_CODECS = f"sharding_indexed ({_CODECS}; bytes, crc32c)"


class Store(DistributionReader):
    """A store opened for reading; see `open`."""

    @classmethod
    def open(cls, path: Path | str | Place) -> Self:
        """Open a store and check its metadata.

        Args:
            path: of a folder, or the URL of a prefix in a bucket.

        Raises:
            UserError: there is none, its version is another, or metadata is missing or wrong.
        """
        place = place_of(path)
        path = place.name
        meta, whole = read_root(place)
        if not place.exists(DOCUMENT):
            what = f"is not a store: it has no {DOCUMENT}" if place.exists() else "does not exist"
            raise UserError(f"{path} {what}", "write a store with `fpo cache --out`")
        if meta.get("format") != FORMAT:
            raise UserError(
                f"{path} is not an fpo store, or its {DOCUMENT} is damaged",
                f"write a store with `fpo cache --out`; if it was one, {REPAIR}",
            )
        if is_begun(meta):
            raise UserError(
                f"writing the tokens of {path} was interrupted",
                "run `fpo cache` again with the same flags",
            )
        version = str(meta.get("version"))
        if version.split(".")[0] != VERSION.split(".")[0]:
            raise UserError(
                f"{path} is a store of version {version}; this fpo reads version 1",
                "write the store again, or install the fpo that wrote it",
            )
        # Version 1.0 has no checksums and does not record T.
        early = version == "1.0" and "checksum" not in meta
        if early:
            meta["tokens"] = array_document(place, "tokens").get("shape", [None])[0]
        elif not whole:
            raise UserError(f"{path}/{DOCUMENT} is damaged or was edited", REPAIR)
        if wrong := wrong_attribute(meta):
            raise UserError(f"the metadata of {path} is invalid: {wrong}", REPAIR)
        check_documents(place, meta)
        try:
            store = cls(place, meta)
        except BROKEN as error:
            raise UserError(f"{path} cannot be opened: {error}", REPAIR) from error
        store._check_arrays()
        return store

    def _check_arrays(self) -> None:
        for name, expected in array_schema(self.meta).items():
            if name.startswith(("blocks/layer_", "blocks/totals")) and not self.has_totals:
                continue
            try:
                array = self._array(name)
                found = ArraySchema(array.shape, str(array.dtype), array.chunks, array.shards)
                codecs = _names([codec.to_dict() for codec in array.metadata.codecs])
            except BROKEN as error:
                raise UserError(f"{self.path} lacks the array {name}", REPAIR) from error
            if found != expected:
                raise UserError(
                    f"the array {name} of {self.path} is {found}, expected {expected}",
                    REPAIR,
                )
            if codecs != (known := _SHARD_CODECS if expected.shards else _CODECS):
                raise UserError(
                    f"the array {name} of {self.path} has the codecs {codecs}, expected {known}",
                    REPAIR,
                )

    @property
    def scored(self) -> int:
        """Number of pairs of a complete store that have reference values."""
        return self.pairs - len(self.non_finite)

    @property
    def has_totals(self) -> bool:
        """Whether the blocks' totals are stored; version 1.0 deletes them."""
        return "documents" in self.meta

    def unscored_blocks(self) -> list[int]:
        """The blocks without reference values."""
        blocks = range(self.blocks)
        scored = self.place.together([partial(self.is_scored, block) for block in blocks])
        return [block for block in blocks if not scored[block]]

    def require_complete(self) -> None:
        """Refuse a store that is not complete.

        Raises:
            UserError: it says how many blocks are scored, and how to complete the store.
        """
        if self.meta["state"] != "complete":
            done = self.blocks - len(self.unscored_blocks())
            raise UserError(
                f"{self.path} is {self.meta['state']}: {done} of {self.blocks} blocks are scored",
                "complete it with the `fpo cache` command that began it",
            )

    def tokens(self, block: int) -> TokenPairs:
        """The token ids of a block's pairs."""
        rows = self.pairs_in(block)
        names = ["spans", "source_row", *(["source"] if self.is_mixture else [])]
        read = self._read_together(dict.fromkeys(names, rows), block)
        spans = read["spans"]
        begin, end = int(spans[0, 0]), int(spans[-1, 3])
        if not (begin >= 0 and end <= self.meta["tokens"] and (np.diff(spans) > 0).all()):
            raise self._damaged("spans", block, "they do not describe token ids")
        ids = self._read("tokens", slice(begin, end), block)
        return TokenPairs(ids, spans - begin, read["source_row"], read.get("source"))

    def neuronpedia(self, site: str) -> str | None:
        """The id of a site's SAE at Neuronpedia, such as gemma-2-2b/25-gemmascope-res-16k; None if
        it is not known."""
        return self.meta.get("neuronpedia", {}).get(site)

    def pair(self, number: int) -> TokenPair:
        """The token ids of a pair by its number in the store."""
        block, row = divmod(number, self.block_size)
        return self.tokens(block).pair(row)

    def reference(self, block: int, tokens: TokenPairs) -> ReferenceValues:
        """The reference values of a block.

        Args:
            block: which one.
            tokens: its token ids, which the digest covers as well.

        Raises:
            UserError: a checksum is wrong, or the block does not match its digest.
        """
        rows, own = self.pairs_in(block), slice(block, block + 1)
        parts = {"ref/logp": rows, "ref/margin": rows, "blocks/digest": own}
        for site, about in self.sites.items():
            names = ("index", "value", "nonzero", *(("kept",) if kept_features(about) else ()))
            parts |= {f"features/{site}/{name}": rows for name in names}
        if self.has_kept:
            parts["blocks/kept"] = own
        read = self._read_together(parts, block)
        reference = ReferenceValues(
            logp=read["ref/logp"],
            margin=read["ref/margin"],
            features={site: self._features(site, read) for site in self.sites},
        )
        if digest_of_block(tokens, reference) != read["blocks/digest"][0]:
            raise self._damaged("blocks/digest", block, "the values do not match it")
        if self.has_kept and digest_of_kept(block, reference) != read["blocks/kept"][0]:
            raise self._damaged("blocks/kept", block, "the values do not match it")
        self.check_not_replaced()
        gaps = rows.start + np.flatnonzero(np.isnan(reference.margin))
        known = [pair for pair in self.non_finite if rows.start <= pair < rows.stop]
        if self.meta["state"] == "complete" and gaps.tolist() != known:
            raise self._damaged("ref/margin", block, "missing values do not match the metadata")
        return reference

    def check_reference(self, block: int, tokens: TokenPairs) -> np.ndarray:
        """Read everything that a block holds of the reference.

        Args:
            block: as `reference` takes it.
            tokens: likewise.

        Returns:
            bool [b], the pairs without reference values.

        Raises:
            UserError: a checksum or digest is wrong.
        """
        missing = np.isnan(self.reference(block, tokens).margin)
        if self.distributions:
            self.check_distributions(block, tokens.counts, missing)
        return missing

    def _features(self, site: str, read: dict[str, np.ndarray]) -> TopFeatures[np.ndarray]:
        index, value, nonzero = (
            read[f"features/{site}/{name}"] for name in ("index", "value", "nonzero")
        )
        kept = np.array(kept_features(self.sites[site]), np.int64)
        none = np.empty((len(index), 2, 0), value.dtype)
        kept_value = read.get(f"features/{site}/kept", none)
        return TopFeatures(index, value, nonzero, kept_value, kept)

    def mean(self, site: str) -> np.ndarray:
        """Mean pooled features over all responses: float32 [m]."""
        return self._total(f"features/{site}/mean")

    def frequency(self, site: str) -> np.ndarray:
        """Number of chosen / rejected responses in which each feature is > 0: int64 [2, m]."""
        return self._total(f"features/{site}/frequency")

    def _total(self, name: str) -> np.ndarray:
        self._require_file(name, 0, None)
        values = self._read(name, slice(None))
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self._damaged(name, None, "it holds missing values")
        return values

    def totals(self, block: int) -> dict[str, FeatureTotals]:
        """The sums over a block's responses, by site."""
        rows = slice(block, block + 1)
        totals = {
            site: FeatureTotals(
                self._read(f"blocks/{site}/sum", rows, block)[0],
                self._read(f"blocks/{site}/frequency", rows, block)[0],
            )
            for site in self.sites
        }
        if digest_of_totals(block, totals) != self._read("blocks/totals", rows, block)[0]:
            raise self._damaged("blocks/totals", block, "the sums do not match it")
        return totals

    def sum_totals(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By site mean, float32 [m], and frequency, int64 [2, m], made from the blocks' totals."""
        total = {
            site: FeatureTotals(np.zeros(about["d_sae"]), np.zeros((2, about["d_sae"]), np.int64))
            for site, about in self.sites.items()
        }
        for block in range(self.blocks):
            for site, part in self.totals(block).items():
                total[site].value[:] += part.value
                total[site].frequency[:] += part.frequency
        responses = 2 * self.scored
        return {
            site: ((made.value / responses).astype(np.float32), made.frequency)
            for site, made in total.items()
        }


def _names(codecs: Any) -> str:
    """The names of an array's codecs; of shards also those inside, and those of their index."""
    names = []
    for codec in codecs:
        inside = codec.get("configuration", {})
        shard = "index_codecs" in inside
        inner = f" ({_names(inside['codecs'])}; {_names(inside['index_codecs'])})" if shard else ""
        names.append(codec["name"] + inner)
    return ", ".join(names)
