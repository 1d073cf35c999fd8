"""Hands out the blocks of a store to Ray's actors, and again what a lost actor or host had.

An actor that is lost is replaced by a new one, which Ray places where there is room, perhaps on a
host that was added meanwhile. It is handed blocks as soon as it has loaded the model. Where a
block's worker dies three times, the block's pairs are tried one by one: a pair whose worker dies
three times as well is to blame.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fpocli.caching.score_block import ScoredBlock
from fpocli.store.records import TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.console import progress, say, warn
from fpocli.system.errors import UserError

# What an actor is handed at a time: a block that it scores, and the next.
_AHEAD = 2
_DEATHS = 3
# Seconds between two looks at how many actors there should be.
_LOOK_EVERY = 1.0
_LOGS = "Ray's logs say more, in /tmp/ray/session_latest/logs of the worker's host"


class _Job(NamedTuple):
    """A block without some of its pairs; or the attempt whether one pair can be scored."""

    block: int
    left_out: frozenset[int] = frozenset()
    pair: int | None = None


@dataclass(eq=False)
class _Actor:
    """An actor, and what it is to do, one after the other: each with Ray's reference to the result.
    The first is to start, which is no job."""

    handle: Any
    asked: deque[tuple[Any, _Job | None]] = field(default_factory=deque)
    started: bool = False


class HandOut:
    """The blocks that wait, and the actors that score.

    Args:
        ray: the module, connected.
        make: makes a handle of a new actor (on_ray.Worker).
        number: how many actors there should be now.
        tokens: returns the token ids of a block.
        drop_crashing: leave out a pair that ends its worker again and again.
    """

    def __init__(
        self,
        ray: Any,
        make: Callable[[], Any],
        number: Callable[[], int],
        tokens: Callable[[int], TokenPairs],
        *,
        drop_crashing: bool,
    ) -> None:
        self._ray, self._make, self._number, self._tokens = ray, make, number, tokens
        self._drop_crashing = drop_crashing
        self._actors: list[_Actor] = []
        self._waiting: deque[_Job] = deque()
        self._deaths: Counter[_Job] = Counter()
        # Pairs and token ids of each block that is handed out.
        self._sizes: dict[int, tuple[int, int]] = {}
        # Of each block whose pairs are tried: those that are left, and those that are to blame.
        self._untried: dict[int, set[int]] = {}
        self._crashing: dict[int, set[int]] = {}
        self._failed_starts = 0
        self._told = False

    def start(self) -> None:
        """Wait for the first actor.

        Raises:
            UserError: an actor cannot use the model, or actors end before they have loaded it.
        """
        with progress("Starting workers", None):
            while not any(actor.started for actor in self._actors):
                self._look()

    def scored(self, blocks: list[int], bar: Bar) -> Iterator[tuple[int, ScoredBlock]]:
        """Score blocks, and return each with its number as soon as it is done.

        Args:
            blocks: their numbers.
            bar: advanced by the pairs that are done.

        Raises:
            UserError: as `start`; or a value is non-finite, or actors end again and again with the
                same block.
        """
        self._waiting.extend(map(_Job, blocks))
        while self._waiting or any(job for actor in self._actors for _, job in actor.asked):
            for block, scored in self._look():
                pairs, ids = self._sizes.pop(block)
                bar.advance(pairs, pairs=pairs, tokens=ids)
                yield block, scored

    def _look(self) -> list[tuple[int, ScoredBlock]]:
        """See to it that every actor has something to do, and wait a moment for what is done."""
        self._add_actors()
        self._fill()
        scored = []
        # Of each actor the first alone, so that what ended an actor is known.
        coming = {actor.asked[0][0]: actor for actor in self._actors if actor.asked}
        done, _ = self._ray.wait(list(coming), timeout=_LOOK_EVERY)
        for reference in done:
            actor = coming[reference]
            try:
                result = self._ray.get(reference)
            except self._ray.exceptions.RayTaskError as error:
                # Our code in the actor has raised it.
                raise error.cause or error from error
            except self._ray.exceptions.RayError as error:
                self._replace(actor, error)
                continue
            _, job = actor.asked.popleft()
            if job is None:
                self._begin(actor, result)
            elif job.pair is None:
                scored.append((job.block, result))
            else:
                self._acquit(job.block, job.pair)
        return scored

    def _add_actors(self) -> None:
        while len(self._actors) < self._number():
            actor = _Actor(self._make())
            actor.asked.append((actor.handle.start.remote(), None))
            self._actors.append(actor)

    def _begin(self, actor: _Actor, what_runs: str) -> None:
        actor.started = True
        self._failed_starts = 0
        if not self._told:
            say(what_runs)
            self._told = True

    def _fill(self) -> None:
        """First every actor has something to do, then something that waits."""
        for ahead in range(_AHEAD):
            for actor in self._actors:
                if not (actor.started and self._waiting and len(actor.asked) <= ahead):
                    continue
                jobs = [self._waiting[0], *(job for _, job in actor.asked if job)]
                # What may end an actor might take along the result of what it did before.
                if not ahead or not any(map(self._suspicious, jobs)):
                    self._hand(actor, self._waiting.popleft())

    def _suspicious(self, job: _Job) -> bool:
        return job.pair is not None or self._deaths[job] > 0

    def _hand(self, actor: _Actor, job: _Job) -> None:
        tokens, method, left_out = self._tokens(job.block), actor.handle.score, job.left_out
        self._sizes[job.block] = len(tokens), len(tokens.ids)
        if job.pair is not None:
            method = actor.handle.attempt
            left_out = frozenset(range(len(tokens))) - {job.pair}
        actor.asked.append((method.remote(tokens, left_out), job))

    def _replace(self, lost: _Actor, error: Exception) -> None:
        """Hand out again what an actor had that is lost; the first job may be to blame."""
        self._actors.remove(lost)
        if not lost.started:
            self._failed_starts += 1
            # Each of them as often as a block may end one: single hosts may be lost at any time.
            most = _DEATHS * self._number()
            if self._failed_starts >= most and not any(a.started for a in self._actors):
                raise UserError(
                    f"{most} workers ended before they had loaded the model: {_reason(error)}",
                    f"is there enough memory? {_LOGS}",
                )
        say(f"a worker was lost, and what it had is scored again: {_reason(error)}")
        first, *others = [job for _, job in lost.asked]
        # What it was about to do comes first again.
        self._waiting.extendleft(job for job in reversed(others) if job)
        if first:
            self._blame(first)

    def _blame(self, job: _Job) -> None:
        self._deaths[job] += 1
        if self._deaths[job] < _DEATHS:
            self._waiting.appendleft(job)
        elif job.pair is not None:
            self._convict(job.block, job.pair)
        elif job.block in self._crashing:
            raise UserError(
                f"block {job.block} ended its worker {_DEATHS} times, and none of its pairs does "
                "so alone",
                f"try a smaller --packed-length; {_LOGS}",
            )
        else:
            pairs = range(len(self._tokens(job.block)))
            self._untried[job.block], self._crashing[job.block] = set(pairs), set()
            self._waiting.extend(_Job(job.block, pair=pair) for pair in pairs)

    def _convict(self, block: int, pair: int) -> None:
        place = self._tokens(block).place(pair)
        message = f"scoring the pair in {place} ended its worker {_DEATHS} times"
        if not self._drop_crashing:
            raise UserError(message, f"--drop-crashing leaves such pairs out; {_LOGS}")
        warn(f"{message}; the pair is dropped")
        self._crashing[block].add(pair)
        self._acquit(block, pair)

    def _acquit(self, block: int, pair: int) -> None:
        """A pair has been tried; after the last one the block is scored again."""
        self._untried[block].remove(pair)
        if not self._untried[block]:
            job = _Job(block, frozenset(self._crashing[block]))
            self._deaths[job] = 0
            self._waiting.append(job)


def _reason(error: Exception) -> str:
    """The first line of an error of Ray's; those that follow name its parts."""
    return str(error).strip().partition("\n")[0]
