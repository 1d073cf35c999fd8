"""The store -> batches of every step and rank.

The order is a pure function of seed and epoch, and a step is the same B pairs however many ranks
share it; so the state of the stream is the number of the step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fpocli.batches import Batch, pack
from fpocli.distance import StoredFeatures
from fpocli.objective import ReferenceRows
from fpocli.rows import Reference, Tokens
from fpocli.store import Store

# Blocks whose pairs are shuffled together; twice as many are held in memory.
_WINDOW = 4
# Held-out pairs depend on the store and the fraction alone, not on the training seed.
_HELD_OUT_SEED = 0


@dataclass(frozen=True)
class MicroBatch:
    """What one rank scores at once.

    Args:
        batch: P pairs.
        reference: the store's rows of the same pairs.
        weights: float32 [P], what each pair counts in the mean of the whole step; 0 for a pair
            that only keeps a rank without work in step with the others.
        tokens: float32 [P], tokens of each pair, the prompt once.
    """

    batch: Batch
    reference: ReferenceRows
    weights: Tensor
    tokens: Tensor


class Stream:
    """Reads a complete store for one rank.

    Args:
        store: the store.
        batch_size: pairs per step over all ranks.
        micro_batch: pairs per forward pass and rank.
        eval_fraction: share of the pairs held out.
        seed: of the order.
        rank: of this process.
        world: number of processes.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch_size: int,
        micro_batch: int,
        eval_fraction: float,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.store = store
        self.batch_size, self.micro_batch, self.seed = batch_size, micro_batch, seed
        self.rank, self.world = rank, world
        self.held_out = held_out(store.pairs, eval_fraction)
        training = store.pairs - len(self.held_out)
        self.steps_per_epoch = -(-training // batch_size)
        self.accumulation = -(-batch_size // (micro_batch * world))
        self._block = lru_cache(maxsize=2 * _WINDOW)(self._read_block)
        self._order = lru_cache(maxsize=1)(self._epoch_order)

    def step(self, step: int, device: torch.device) -> Iterator[MicroBatch]:
        """This rank's micro-batches of an optimiser step, always `accumulation` of them."""
        yield from self._share(self.pairs(step), self.accumulation, device)

    def pairs(self, step: int) -> np.ndarray:
        """The pairs of an optimiser step, over all ranks."""
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        return self._order(epoch)[start : start + self.batch_size]

    def evaluation(self, device: torch.device) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the held-out pairs, as many on every rank."""
        batches = -(-len(self.held_out) // (self.micro_batch * self.world))
        yield from self._share(self.held_out, batches, device)

    def _share(self, pairs: np.ndarray, batches: int, device: torch.device) -> Iterator[MicroBatch]:
        for micro in range(batches):
            start = (micro * self.world + self.rank) * self.micro_batch
            mine = pairs[start : start + self.micro_batch]
            weight = 1 / len(pairs) if len(mine) else 0.0
            yield self._load(mine if len(mine) else pairs[:1], weight, device)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        """All training pairs: blocks in random order, pairs shuffled inside a window of blocks."""
        rng = np.random.default_rng([self.seed, epoch])
        blocks = rng.permutation(self.store.blocks)
        order = []
        for start in range(0, len(blocks), _WINDOW):
            rows = [self.store.rows(block) for block in blocks[start : start + _WINDOW].tolist()]
            pairs = np.concatenate([np.arange(row.start, row.stop) for row in rows])
            pairs = pairs[~np.isin(pairs, self.held_out)]
            rng.shuffle(pairs)
            order.append(pairs)
        return np.concatenate(order)

    def _read_block(self, block: int) -> tuple[Tokens, Reference]:
        tokens = self.store.tokens(block)
        return tokens, self.store.reference(block, tokens)

    def _load(self, pairs: np.ndarray, weight: float, device: torch.device) -> MicroBatch:
        places = [divmod(pair, self.store.block_size) for pair in pairs.tolist()]
        token_pairs, rows = [], []
        for block, row in places:
            tokens, reference = self._block(block)
            token_pairs.append(tokens.pair(row))
            rows.append((reference, row))
        return MicroBatch(
            batch=pack(token_pairs).to(device),
            reference=_reference_rows(rows, device),
            weights=torch.full((len(pairs),), weight, device=device),
            tokens=torch.tensor([float(len(pair)) for pair in token_pairs], device=device),
        )


def held_out(pairs: int, fraction: float) -> np.ndarray:
    """The pairs that are not trained on, sorted; at least one where a fraction is asked for."""
    if fraction == 0:
        return np.empty(0, np.int64)
    count = max(1, round(fraction * pairs))
    return np.sort(np.random.default_rng(_HELD_OUT_SEED).permutation(pairs)[:count])


def _reference_rows(rows: list[tuple[Reference, int]], device: torch.device) -> ReferenceRows:
    def gather(arrays: list[np.ndarray], dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).to(device, dtype)

    sites = rows[0][0].features
    return ReferenceRows(
        logp=gather([reference.logp[row] for reference, row in rows], torch.float32),
        margin=gather([reference.margin[row] for reference, row in rows], torch.float32),
        features={
            site: StoredFeatures(
                *(
                    gather([getattr(ref.features[site], name)[row] for ref, row in rows], dtype)
                    for name, dtype in (
                        ("index", torch.int64),
                        ("value", torch.float32),
                        ("nonzero", torch.int64),
                    )
                )
            )
            for site in sites
        },
    )
