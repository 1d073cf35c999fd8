"""The data loader: a store -> the packed sequences of every step and rank.

The order of the pairs is a pure function of seed and epoch, and a step consists of the same pairs
for any number of packed sequences and ranks. So the loader's state is the number of the step.
Blocks are read whole and only a few are in memory, so memory does not grow with the store.

Shapes: P pairs of a packed sequence.
"""

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch

from fpocli.model.attention import length_multiple
from fpocli.model.packing import pack, plan_packing
from fpocli.store.reader import Store
from fpocli.store.records import ReferenceValues, TokenPairs
from fpocli.training.micro_batch import MicroBatch, reference_tensors, top_tensors
from fpocli.training.prefetched import Prefetched

# Blocks whose pairs are shuffled together; while they are used, threads read the next as many.
_WINDOW = 4
# Which pairs are held out depends on the store and the fraction, not on the training seed.
_HELD_OUT_SEED = 0


_Block = tuple[TokenPairs, ReferenceValues]


class PairLoader:
    """Reads a complete store for one rank.

    Args:
        store: the store.
        batch_size: pairs per step over all ranks.
        packed_length: the most tokens of a packed sequence.
        eval_fraction: share of the pairs held out; 1 is all.
        seed: of the order of the pairs.
        rank: of this process.
        world: number of processes.
        sites: whose features are loaded; None for all.
        where: bool [N], the pairs to train on; None for all. The same pairs are held out.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int,
        packed_length: int,
        eval_fraction: float,
        seed: int,
        rank: int,
        world: int,
        sites: Collection[str] | None = None,
        where: np.ndarray | None = None,
    ) -> None:
        self.store = store
        self._sites = store.sites.keys() if sites is None else sites
        self.batch_size, self.packed_length, self.seed = batch_size, packed_length, seed
        self.rank, self.world = rank, world
        self._not_finite = np.array(store.non_finite, np.int64)
        share = round(eval_fraction * store.scored)
        self.held_out_pairs = max(1, share) if eval_fraction > 0 else 0
        self._where = where
        self.training_pairs = sum(map(self._training_count, range(store.blocks)))
        self.steps_per_epoch = -(-self.training_pairs // batch_size)
        self._threads = ThreadPoolExecutor(_WINDOW)
        self._block = lru_cache(maxsize=2 * _WINDOW)(self._begin_block)
        self._blocks = lru_cache(maxsize=2)(self._block_order)
        self._window = lru_cache(maxsize=2)(self._shuffled_window)

    def steps(
        self, start: int, stop: int, device: torch.device, *, with_top: bool = False
    ) -> Prefetched[list[MicroBatch]]:
        """This rank's micro-batches of the optimiser steps from `start` on, prepared in a thread.

        In a step every rank has the same number of them.

        Args:
            start, stop: the first step, and the one after the last.
            device: of the tensors.
            with_top: whether the store's distributions are read.
        """

        def prepared() -> Iterator[list[MicroBatch]]:
            for step in range(start, stop):
                yield list(self._share(self.pairs(step), device, with_top=with_top))
                self._begin_next(step, stop)

        return Prefetched(prepared())

    def pairs(self, step: int) -> np.ndarray:
        """The numbers of an optimiser step's pairs, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        _, ends = self._blocks(epoch)
        start = position * self.batch_size
        stop = start + self.size(step)
        parts = []
        while start < stop:
            window = int(np.searchsorted(ends, start, side="right"))
            first = ends[window - 1] if window else 0
            part = self._window(epoch, window)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return np.concatenate(parts)

    def size(self, step: int) -> int:
        """Number of pairs in a step; the last step of an epoch may have fewer."""
        done = step % self.steps_per_epoch * self.batch_size
        return min(self.batch_size, self.training_pairs - done)

    def evaluation(
        self, device: torch.device, split: str = "eval", *, with_top: bool = False
    ) -> Prefetched[MicroBatch]:
        """This rank's micro-batches of a split, prepared in a thread.

        Every rank has the same number of them.

        Args:
            device: of the tensors.
            split: eval, the held-out pairs; train, the others; or all.
            with_top: whether the store's distributions are read.
        """

        def prepared() -> Iterator[MicroBatch]:
            ends = [*range(0, self.store.blocks, _WINDOW), self.store.blocks]
            for first, last in pairwise(ends):
                pairs = np.concatenate([self._split(block, split) for block in range(first, last)])
                for block in range(first, min(last + _WINDOW, self.store.blocks)):
                    self._block(block)
                if len(pairs):
                    weight = 1 / self.split_size(split)
                    yield from self._share(pairs, device, weight, with_top=with_top)

        return Prefetched(prepared())

    def split_size(self, split: str) -> int:
        """Number of pairs in a split."""
        sizes = {"eval": self.held_out_pairs, "train": self.training_pairs}
        return sizes.get(split, self.store.scored)

    def _split(self, block: int, split: str) -> np.ndarray:
        """The pairs of a block in a split, sorted."""
        pairs = self._scored(block)
        if split == "all":
            return pairs
        held_out = self.held_out(block)
        if split == "eval":
            return held_out
        training = np.setdiff1d(pairs, held_out)
        return training if self._where is None else training[self._where[training]]

    def held_out(self, block: int) -> np.ndarray:
        """The held-out pairs of a block, sorted."""
        pairs = self._scored(block)
        order = np.random.default_rng([_HELD_OUT_SEED, block]).permutation(len(pairs))
        return pairs[np.sort(order[: self._held_out_count(block)])]

    def _training_count(self, block: int) -> int:
        if self._where is not None:
            return len(self._split(block, "train"))
        first, last = self._scored_up_to(block)
        return last - first - self._held_out_count(block)

    def _held_out_count(self, block: int) -> int:
        first, last = (
            end * self.held_out_pairs // self.store.scored for end in self._scored_up_to(block)
        )
        return last - first

    def _scored(self, block: int) -> np.ndarray:
        """The pairs of a block that have reference values, sorted."""
        rows = self.store.pairs_in(block)
        return np.setdiff1d(np.arange(rows.start, rows.stop), self._not_finite)

    def _scored_up_to(self, block: int) -> tuple[int, int]:
        """Number of pairs with reference values before a block, and up to its end."""
        rows = self.store.pairs_in(block)
        first, last = (
            end - int(np.searchsorted(self._not_finite, end)) for end in (rows.start, rows.stop)
        )
        return first, last

    def _share(
        self,
        pairs: np.ndarray,
        device: torch.device,
        weight: float | None = None,
        *,
        with_top: bool,
    ) -> Iterator[MicroBatch]:
        """This rank's part of `pairs`, packed; each pair has the same weight, 1 / their number
        unless set."""
        places = [divmod(pair, self.store.block_size) for pair in pairs.tolist()]
        coming = {block: self._block(block) for block, _ in places}
        blocks = {block: reading.result() for block, reading in coming.items()}
        spans = np.array([blocks[block][0].spans[row] for block, row in places])
        lengths = (spans[:, 3] - spans[:, 0]).tolist()
        packed = plan_packing(lengths, self.packed_length, self.world)
        for members in packed[self.rank :: self.world]:
            if members:
                chosen, counts = [places[i] for i in members], weight or 1 / len(pairs)
            else:
                # Without work, but the other ranks need this one in every backward pass.
                chosen, counts = [places[int(np.argmin(lengths))]], 0.0
            yield self._load(chosen, blocks, counts, device, with_top=with_top)

    def _block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in random order, and the number of training pairs up to the end of each
        window of blocks."""
        blocks = np.random.default_rng([self.seed, epoch]).permutation(self.store.blocks)
        counts = [self._training_count(block) for block in blocks.tolist()]
        ends = np.add.reduceat(counts, np.arange(0, len(blocks), _WINDOW)).cumsum()
        return blocks, ends

    def _shuffled_window(self, epoch: int, window: int) -> np.ndarray:
        """The training pairs of a window of blocks, shuffled."""
        order, _ = self._blocks(epoch)
        blocks = order[window * _WINDOW : (window + 1) * _WINDOW].tolist()
        pairs = np.concatenate([self._split(block, "train") for block in blocks])
        return np.random.default_rng([self.seed, epoch, window]).permutation(pairs)

    def _begin_next(self, step: int, stop: int) -> None:
        """Begin to read the window of blocks after the one in which a step ends."""
        epoch, position = divmod(step, self.steps_per_epoch)
        order, ends = self._blocks(epoch)
        done = position * self.batch_size + self.size(step)
        window = int(np.searchsorted(ends, done))
        # Its own blocks as well: those of earlier windows then are the ones that are forgotten.
        blocks = order[window * _WINDOW :][: 2 * _WINDOW].tolist()
        if len(blocks) <= _WINDOW and (epoch + 1) * self.steps_per_epoch < stop:
            blocks += self._blocks(epoch + 1)[0][:_WINDOW].tolist()
        for block in blocks:
            self._block(block)

    def _begin_block(self, block: int) -> Future[_Block]:
        return self._threads.submit(self._read_block, block)

    def _read_block(self, block: int) -> _Block:
        tokens = self.store.tokens(block)
        # The digest covers all sites, so all are read.
        reference = self.store.reference(block, tokens)
        features = {site: reference.features[site] for site in self._sites}
        return tokens, replace(reference, features=features)

    def _load(
        self,
        places: list[tuple[int, int]],
        blocks: dict[int, _Block],
        weight: float,
        device: torch.device,
        *,
        with_top: bool,
    ) -> MicroBatch:
        token_pairs, values = [], []
        for block, row in places:
            tokens, reference = blocks[block]
            token_pairs.append(tokens.pair(row))
            values.append((reference, row))
        batch = pack(token_pairs, length_multiple(device))
        lengths = batch.spans[:, 3] - batch.spans[:, 0]
        pairs = [block * self.store.block_size + row for block, row in places]
        return MicroBatch(
            pairs=np.array(pairs),
            batch=batch.to(device),
            reference=reference_tensors(values, device),
            pair_weights=torch.full((len(places),), weight, device=device),
            tokens=torch.tensor(lengths, dtype=torch.float32, device=device),
            top=top_tensors(self.store.top_tokens(pairs), device) if with_top else None,
        )
