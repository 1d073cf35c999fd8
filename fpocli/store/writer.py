"""A store that is being written: laid out, filled block by block, finished, mended.

docs/format.md has the order of writing. With store.py the only importer of zarr.
Shapes: N pairs, b pairs of one block.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from zarr.codecs import Crc32cCodec, ZstdCodec

from fpocli.config import MAY_DIFFER
from fpocli.features.top_features import TopFeatures
from fpocli.store.digest import digest_of_block, digest_of_totals
from fpocli.store.layout import FORMAT, VERSION, fingerprint, layout
from fpocli.store.metadata import array_document, attributes, document_sums, is_begun, write_root
from fpocli.store.reader import Store
from fpocli.store.records import FeatureTotals, ReferenceValues, TokenPairs
from fpocli.system.console import progress
from fpocli.system.errors import UserError
from fpocli.system.files import is_empty, remove_folder


class StoreWriter(Store):
    """An open store that may be written. Make one with `create` or `open`."""

    _mode: Literal["r", "r+"] = "r+"

    @classmethod
    def create(cls, path: Path, about: dict[str, Any], tokens: TokenPairs) -> Self:
        """Write the token runs and lay out the rest, filled with gaps.

        Args:
            path: a folder that is empty or not there yet.
            about: the attributes of docs/format.md but those that are made here (format, version,
                state, tokens, fingerprint, documents, checksum, and created if it lacks it).
            tokens: all pairs; spans count from the first token of the store.
        """
        path.mkdir(parents=True, exist_ok=True)
        # A store that says no more was stopped on the way here and starts over.
        write_root(path, {"format": FORMAT})
        meta = {"created": datetime.now(UTC).isoformat(timespec="seconds")} | about
        meta |= {
            "format": FORMAT,
            "version": VERSION,
            "state": "tokenised",
            "tokens": len(tokens.ids),
            "fingerprint": fingerprint(about),
        }
        store = cls(path, meta)
        # Here too, so that blocks are known when the root's document is lost.
        store._group.create_group("blocks", attributes={"fingerprint": meta["fingerprint"]})
        for name, array in layout(meta).items():
            store._group.create_array(
                name,
                **array._asdict(),
                compressors=[ZstdCodec(level=3), Crc32cCodec()],
                fill_value=array.fill(name),
            )
        store._array("tokens")[:] = tokens.ids
        store._array("spans")[:] = tokens.spans
        store._array("source_row")[:] = tokens.source_row
        meta["documents"] = document_sums(path)
        # Written last.
        write_root(path, meta)
        return store

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open a store to go on with it.

        Raises:
            UserError: as `Store.open`, or an earlier version began it.
        """
        store = super().open(path)
        if not store.has_totals and store.meta["state"] != "complete":
            raise UserError(
                f"{path} was begun by an earlier version of fpo",
                "complete it with that version, or give --overwrite",
            )
        return store

    def missing_values(self, b: int) -> ReferenceValues:
        """Rows of b pairs to be filled, which hold gaps."""
        arrays = layout(self.meta)

        def rows(name: str) -> np.ndarray:
            array = arrays[name]
            return np.full((b, *array.shape[1:]), array.fill(name), array.dtype)

        features = {
            site: TopFeatures(
                *(rows(f"features/{site}/{name}") for name in ("index", "value", "nonzero"))
            )
            for site in self.sites
        }
        return ReferenceValues(rows("ref/logp"), rows("ref/margin"), features)

    def write_block(
        self, block: int, reference: ReferenceValues, totals: dict[str, FeatureTotals]
    ) -> None:
        """Write the reference rows of a block, whole, and its record last."""
        if self.require_same()["state"] == "tokenised":
            self._set_state("partial")
        rows = self.pairs_in(block)
        self._array("ref/logp")[rows] = reference.logp
        self._array("ref/margin")[rows] = reference.margin
        for site, features in reference.features.items():
            for name in ("index", "value", "nonzero"):
                self._array(f"features/{site}/{name}")[rows] = getattr(features, name)
            self._array(f"blocks/{site}/sum")[block] = totals[site].value
            self._array(f"blocks/{site}/frequency")[block] = totals[site].frequency
        self._array("blocks/totals")[block] = digest_of_totals(block, totals)
        self._array("blocks/digest")[block] = digest_of_block(self.tokens(block), reference)

    def record_allowed(self, model: dict[str, Any]) -> None:
        """Keep in the store that the blocks to come are made with another dtype or kernel, which
        --allow lets differ.

        Args:
            model: attributes of the model as it is now.
        """
        noted = dict(self.meta.get("allowed", {}))
        for name in MAY_DIFFER.values():
            known = [self.meta["model"][name], *noted.get(name, [])]
            if model[name] not in known:
                noted[name] = [*known[1:], model[name]]
        if noted != self.meta.get("allowed", {}) and self.unscored_blocks():
            self.meta["allowed"] = noted
            write_root(self.path, self.meta)

    def forget_block(self, block: int) -> None:
        """Take a block's record away, so that it is scored anew."""
        self._array("blocks/digest")[block] = 0
        self._done.discard(block)

    def finish(self) -> None:
        """Read every block back, make mean and frequency of their totals, and mark the store
        complete.

        Raises:
            UserError: a block is missing or damaged, or no pair has numbers.
        """
        non_finite: list[int] = []
        with progress("Checking", self.blocks) as bar:
            for block in range(self.blocks):
                margin = self.reference(block, self.tokens(block)).margin
                non_finite += (
                    self.pairs_in(block).start + np.flatnonzero(np.isnan(margin))
                ).tolist()
                bar.advance()
        if len(non_finite) == self.pairs:
            raise UserError(
                f"no pair of {self.path} has finite numbers", "try --dtype float32, or another SAE"
            )
        if non_finite:
            self.meta["pairs"]["not_finite"] = non_finite
        for site, (mean, frequency) in self.sum_totals().items():
            self._array(f"features/{site}/mean")[:] = mean
            self._array(f"features/{site}/frequency")[:] = frequency
        self._set_state("complete")
        # What kills left of chunks; nobody else writes any more.
        for left in self.path.rglob("*.partial"):
            left.unlink()

    def _set_state(self, state: str) -> None:
        self.meta["state"] = state
        write_root(self.path, self.meta)

    @classmethod
    def rewrite_metadata(cls, path: Path, about: dict[str, Any], tokens: TokenPairs) -> Self:
        """Write a store's documents and tokens anew and keep the blocks' rows, which may belong to
        them or not. The store is then partial.

        Args:
            path: of the store.
            about, tokens: as `create` takes them.
        """
        fresh = path.with_name(f".{path.name}.fpo-repair")
        remove_folder(fresh)
        meta = cls.create(fresh, about, tokens).meta
        # The root's document last.
        for file in sorted(file for file in fresh.rglob("*") if file.is_file()):
            there = path / file.relative_to(fresh)
            there.parent.mkdir(parents=True, exist_ok=True)
            file.replace(there)
        remove_folder(fresh)
        store = cls(path, meta)
        store._set_state("partial")
        return store

    @staticmethod
    def fingerprint_of_blocks(path: Path) -> str | None:
        """What the blocks of a store belong to, where the root's document is lost."""
        return array_document(path, "blocks").get("attributes", {}).get("fingerprint")

    # -- the folder, before it is opened ----------------------------------------------------

    @staticmethod
    def require_replaceable(path: Path) -> None:
        """Refuse a path that holds anything but a store, the beginning of one, or nothing."""
        known = attributes(path).get("format") == FORMAT or StoreWriter.fingerprint_of_blocks(path)
        if path.exists() and not (known or is_empty(path)):
            raise UserError(f"{path} exists and is not an fpo store", "give another --out")

    @staticmethod
    def remove(path: Path) -> None:
        """Delete a store, or what an interrupted `create` left; never anything else."""
        StoreWriter.require_replaceable(path)
        remove_folder(path)

    @staticmethod
    def unfinished(path: Path) -> bool:
        """Whether `path` is an empty folder or what an interrupted `create` left."""
        return is_empty(path) or is_begun(attributes(path))
