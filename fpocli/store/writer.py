"""Writes a store: created, filled block by block, finished, repaired.

The order of writing is in docs/format.md. Shapes: N pairs, b pairs of one block.
"""

import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from zarr.codecs import Crc32cCodec, ZstdCodec

from fpocli.config import MAY_DIFFER
from fpocli.data.top_tokens import TopTokens
from fpocli.store.digest import (
    digest_of_block,
    digest_of_distributions,
    digest_of_kept,
    digest_of_totals,
)
from fpocli.store.distribution_rows import Distributions, lay_out
from fpocli.store.metadata import (
    DOCUMENT,
    array_document,
    attributes,
    document_sums,
    is_begun,
    write_root,
)
from fpocli.store.place import Folder, Place
from fpocli.store.reader import Store
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.store.schema import FORMAT, VERSION, array_schema, fingerprint
from fpocli.system.console import progress
from fpocli.system.errors import UserError


class StoreWriter(Store):
    """A store opened for writing; see `create` and `open`."""

    _mode: Literal["r", "r+"] = "r+"

    @classmethod
    def create(cls, place: Place, about: dict[str, Any], tokens: TokenPairs) -> Self:
        """Write the token ids, and create all other arrays filled with missing values.

        Args:
            place: an empty one.
            about: the attributes of docs/format.md except those made here (format, version, state,
                tokens, distribution_rows, fingerprint, documents, checksum, and created if it is
                missing).
            tokens: all pairs; spans are offsets from the first token of the store.
        """
        # A store with no other attributes was interrupted here and starts over.
        write_root(place, {"format": FORMAT})
        if not isinstance(place, Folder):
            # Elsewhere what is read back for the sums might be cut off.
            return cls(place, cls._copy_new(place, about, tokens))
        meta = {"created": datetime.now(UTC).isoformat(timespec="seconds")} | about
        meta |= {
            "format": FORMAT,
            "version": VERSION,
            "state": "tokenised",
            "tokens": len(tokens.ids),
            "fingerprint": fingerprint(about),
        }
        if distributions := Distributions.of(meta):
            sizes, places = lay_out(tokens.counts, meta["block"], distributions)
            meta["distribution_rows"] = sizes
        store = cls(place, meta)
        # Stored here too, so that blocks can be identified if the root's metadata is lost.
        store._group.create_group("blocks", attributes={"fingerprint": meta["fingerprint"]})
        for name, array in array_schema(meta).items():
            store._group.create_array(
                name,
                **array._asdict(),
                compressors=[ZstdCodec(level=3), Crc32cCodec()],
                fill_value=array.fill(name),
            )
        store._array("tokens")[:] = tokens.ids
        store._array("spans")[:] = tokens.spans
        store._array("source_row")[:] = tokens.source_row
        if tokens.source is not None:
            store._array("source")[:] = tokens.source
        if distributions:
            store._array("ref/top/rows")[:] = places
        meta["documents"] = document_sums(place)
        # Written last.
        write_root(place, meta)
        return store

    @classmethod
    def open(cls, path: Path | str | Place) -> Self:
        """Open a store to continue writing it.

        Raises:
            UserError: as `Store.open`, or an earlier version of fpo began it.
        """
        store = super().open(path)
        if not store.has_totals and store.meta["state"] != "complete":
            raise UserError(
                f"{store.path} was begun by an earlier version of fpo",
                "complete it with that version, or use --overwrite",
            )
        return store

    def write_block(
        self,
        block: int,
        reference: ReferenceValues,
        totals: dict[str, FeatureTotals],
        top: TopTokens[np.ndarray] | None = None,
    ) -> None:
        """Write the reference values of a block, and its digest last.

        Args:
            block: which one.
            reference: of its pairs.
            totals: by site, over its responses.
            top: the distributions at its scored positions, pair by pair, in a store of such.
        """
        if self.check_not_replaced()["state"] == "tokenised":
            self._set_state("partial")
        rows = self.pairs_in(block)
        self._array("ref/logp")[rows] = reference.logp
        self._array("ref/margin")[rows] = reference.margin
        if top:
            self._write_distributions(block, top, np.isnan(reference.margin))
        for site, features in reference.features.items():
            for name in ("index", "value", "nonzero"):
                self._array(f"features/{site}/{name}")[rows] = getattr(features, name)
            if len(features.kept):
                self._array(f"features/{site}/kept")[rows] = features.kept_value
            self._array(f"blocks/{site}/sum")[block] = totals[site].value
            self._array(f"blocks/{site}/frequency")[block] = totals[site].frequency
        if self.has_kept:
            self._array("blocks/kept")[block] = digest_of_kept(block, reference)
        self._array("blocks/totals")[block] = digest_of_totals(block, totals)
        self._array("blocks/digest")[block] = digest_of_block(self.tokens(block), reference)

    def _write_distributions(
        self, block: int, top: TopTokens[np.ndarray], missing: np.ndarray
    ) -> None:
        """Write whole files of rows, and the digest of every pair that is not missing."""
        places, pairs = self._places(block), self.pairs_in(block)
        begin, shard = int(places[0, 0]), self._shard
        for name, values in zip(TopTokens._fields, top, strict=True):
            if values is None:
                continue
            array = self._array(f"ref/top/{name}")
            for first in range(0, len(values), shard):
                part = values[first : first + shard]
                padding = [(0, shard - len(part)), *[(0, 0)] * (part.ndim - 1)]
                start = begin + first
                # Zarr reads a shard before it writes it, which fails if it is damaged.
                self.place.delete(self._key(f"ref/top/{name}", start // shard))
                array[start : start + shard] = np.pad(
                    part, padding, constant_values=array.fill_value
                )
        digests = np.zeros(len(places), np.uint64)
        for row in np.flatnonzero(~missing):
            own = top.at(slice(places[row, 0] - begin, places[row, 2] - begin))
            number = pairs.start + int(row)
            digests[row] = digest_of_distributions(self.meta["fingerprint"], number, own)
        self._array("ref/top/digest")[pairs] = digests

    def record_allowed(self, model: dict[str, Any]) -> None:
        """Record in the store that further blocks are made with another dtype or kernel, which
        --allow permits.

        Args:
            model: attributes of the model in use now.
        """
        noted = dict(self.meta.get("allowed", {}))
        for name in MAY_DIFFER.values():
            known = [self.meta["model"][name], *noted.get(name, [])]
            if model[name] not in known:
                noted[name] = [*known[1:], model[name]]
        if noted != self.meta.get("allowed", {}) and self.unscored_blocks():
            self.meta["allowed"] = noted
            write_root(self.place, self.meta)

    def mark_unscored(self, block: int) -> None:
        """Remove a block's digest, so that it is scored again."""
        self._array("blocks/digest")[block] = 0
        self._done.discard(block)

    def finish(self, may_write: Callable[[], object] = lambda: None) -> None:
        """Read every block back, compute mean and frequency from their totals, and mark the store
        complete.

        Args:
            may_write: called before anything is written; raises if another process writes by then.

        Raises:
            UserError: a block is missing or damaged, or all values are non-finite.
        """
        non_finite: list[int] = []
        with progress("Checking", self.blocks) as bar:
            for block in range(self.blocks):
                missing = self.check_reference(block, self.tokens(block))
                non_finite += (self.pairs_in(block).start + np.flatnonzero(missing)).tolist()
                bar.advance()
        if len(non_finite) == self.pairs:
            raise UserError(
                f"all values of {self.path} are non-finite", "try --dtype float32, or another SAE"
            )
        if non_finite:
            self.meta["pairs"]["not_finite"] = non_finite
        totals = self.sum_totals()
        may_write()
        for site, (mean, frequency) in totals.items():
            self._array(f"features/{site}/mean")[:] = mean
            self._array(f"features/{site}/frequency")[:] = frequency
        self._set_state("complete")
        # No other process writes any more.
        self.place.clear_partial()

    def _set_state(self, state: str) -> None:
        self.meta["state"] = state
        write_root(self.place, self.meta)

    @classmethod
    def rewrite_metadata(cls, place: Place, about: dict[str, Any], tokens: TokenPairs) -> Self:
        """Write a store's metadata and token ids again and keep the blocks, whether they match or
        not. The state is then partial.

        Args:
            place: of the store.
            about, tokens: as `create` takes them.
        """
        store = cls(place, cls._copy_new(place, about, tokens))
        store._set_state("partial")
        return store

    @classmethod
    def _copy_new(cls, place: Place, about: dict[str, Any], tokens: TokenPairs) -> dict[str, Any]:
        """Create a store in a folder of its own and copy its files, the root's metadata last; its
        attributes."""
        with tempfile.TemporaryDirectory() as folder:
            fresh = Folder(Path(folder) / "fresh")
            meta = cls.create(fresh, about, tokens).meta
            for key in sorted(fresh.files(), key=lambda key: key == DOCUMENT):
                place.write(key, fresh.read(key))
        return meta

    @staticmethod
    def fingerprint_of_blocks(place: Place) -> str | None:
        """The fingerprint that the blocks of a store carry, if the root's metadata is lost."""
        return array_document(place, "blocks").get("attributes", {}).get("fingerprint")

    # -- the place, before it is opened ----------------------------------------------------

    @staticmethod
    def require_replaceable(place: Place) -> None:
        """Refuse a place with anything other than a store, a begun store, or nothing."""
        known = attributes(place).get("format") == FORMAT or StoreWriter.fingerprint_of_blocks(
            place
        )
        if place.exists() and not (known or place.is_empty()):
            raise UserError(f"{place.name} exists and is not an fpo store", "choose another --out")

    @staticmethod
    def remove(place: Place) -> None:
        """Delete a store, or the remains of an interrupted `create`; never anything else."""
        StoreWriter.require_replaceable(place)
        if place.exists():
            # Where a crash leaves a part, it is a store that was begun, and starts over.
            write_root(place, {"format": FORMAT})
        place.clear()

    @staticmethod
    def unfinished(place: Place) -> bool:
        """Whether there is nothing, or the remains of an interrupted `create`."""
        return place.is_empty() or is_begun(attributes(place))
