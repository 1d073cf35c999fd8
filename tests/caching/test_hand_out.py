"""Blocks are handed out to real actors of Ray, which end in every way."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from fpocli.caching.hand_out import HandOut
from fpocli.store.records import TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.errors import UserError

# Pairs of each block; the pair p of block b is of row 100 * b + p.
PAIRS = 5


def tokens_of(block: int) -> TokenPairs:
    """Pairs of three tokens each."""
    spans = np.arange(PAIRS)[:, None] * 3 + np.arange(4)
    return TokenPairs(
        np.zeros(3 * PAIRS, np.uint32), spans, np.arange(PAIRS, dtype=np.int64) + 100 * block
    )


@pytest.fixture(scope="module", autouse=True)
def connected():
    """Ray with room for four actors."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def hand_out(tmp_path):
    """Makes the object under test. Its actors "score" a block by returning its rows, the pairs left
    out, and who they are, and end as they are told."""

    def make(fatal=None, starts=(), number=lambda: 3, drop=False, seconds=0.0, alone=True):
        """`fatal` has rows, and how often each ends its actor, `alone` as well or only together
        with others; `starts` what the first actors do instead of starting: an error, or None to
        end; a block takes some `seconds`."""
        folder = Path(tmp_path)

        def count(name):
            """How often something of that name has happened in any process."""
            while True:
                number = len(list(folder.glob(f"{name}-*")))
                try:
                    (folder / f"{name}-{number}").touch(exist_ok=False)
                    return number
                except FileExistsError:
                    pass

        class Light:
            def start(self):
                if (place := count("start")) < len(starts):
                    if starts[place] is None:
                        os._exit(1)
                    raise starts[place]
                return "light"

            def score(self, tokens, left_out):
                rows = [row for p, row in enumerate(tokens.source_row) if p not in left_out]
                for row in rows if alone or len(rows) > 1 else ():
                    if fatal and row in fatal and count(f"row-{row}") < fatal[row]:
                        os._exit(1)
                time.sleep(seconds)
                return rows, left_out, os.getpid()

            def attempt(self, tokens, left_out):
                self.score(tokens, left_out)

        actor = ray.remote(num_cpus=1)(Light)
        return HandOut(ray, actor.remote, number, tokens_of, drop_crashing=drop)

    return make


def scored(hand_out, blocks=range(6)):
    """What comes back, by block; each block once."""
    hand_out.start()
    bar = Bar("", PAIRS * len(blocks))
    found = list(hand_out.scored(list(blocks), bar))
    assert bar.done == PAIRS * len(blocks)
    assert sorted(block for block, _ in found) == list(blocks)
    return dict(found)


def rows_of(block):
    return list(range(100 * block, 100 * block + PAIRS))


def test_every_block_comes_back_once(hand_out):
    for block, (rows, left_out, _) in scored(hand_out(), range(20)).items():
        assert rows == rows_of(block) and not left_out


@pytest.mark.slow
def test_what_a_lost_actor_had_is_handed_out_again(hand_out):
    """Twice with one block, once with two others."""
    for block, (rows, left_out, _) in scored(hand_out({102: 2, 300: 1, 404: 1})).items():
        assert rows == rows_of(block) and not left_out


def test_a_pair_that_ends_its_actor_again_and_again_is_named(hand_out):
    with pytest.raises(UserError, match="the pair in row 203 ended its worker 3 times") as caught:
        scored(hand_out({203: 100}))
    assert "--drop-crashing" in caught.value.hint


def test_such_pairs_are_left_out_with_consent(hand_out, capsys):
    found = scored(hand_out({203: 100, 201: 100}, drop=True))
    for block, (rows, left_out, _) in found.items():
        expected = {2: {1, 3}}.get(block, set())
        assert left_out == expected
        assert rows == [row for row in rows_of(block) if row - 100 * block not in expected]
    warned = capsys.readouterr().err
    assert all(f"row {row} ended its worker" in warned for row in (201, 203))


@pytest.mark.slow
def test_a_block_that_only_bad_luck_has_hit_is_scored_whole(hand_out):
    """Its actors were lost three times, and none of its pairs is to blame."""
    rows, left_out, _ = scored(hand_out({102: 3}))[1]
    assert rows == rows_of(1) and not left_out


@pytest.mark.slow
def test_a_block_that_ends_its_actor_as_a_whole_is_named(hand_out):
    """Alone none of its pairs does."""
    with pytest.raises(UserError, match="block 1 ended its worker 3 times, and none of its pairs"):
        scored(hand_out({102: 100}, alone=False))


@pytest.mark.slow
def test_an_error_of_our_own_code_is_the_commands_error(hand_out):
    with pytest.raises(UserError, match="no such model") as caught:
        hand_out(starts=[UserError("no such model", "look again")], number=lambda: 1).start()
    assert caught.value.hint == "look again"


@pytest.mark.slow
def test_actors_that_end_before_they_have_started_are_replaced_or_reported(hand_out):
    assert len(scored(hand_out(starts=[None, None]))) == 6
    with pytest.raises(UserError, match="9 workers ended before they had loaded the model"):
        hand_out(starts=[None] * 20).start()


@pytest.mark.slow
def test_actors_are_added_when_there_is_room(hand_out):
    """One at first; after ten of the blocks there should be three."""
    most = [1]
    handed = hand_out(number=lambda: most[0], seconds=0.2)
    handed.start()
    actors = []
    for _, (_, _, actor) in handed.scored(list(range(200)), Bar("", 1000)):
        actors.append(actor)
        if len(actors) == 10:
            assert len(set(actors)) == 1
            most[0] = 3
    assert len(set(actors)) == 3
