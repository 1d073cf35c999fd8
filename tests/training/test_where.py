"""--where chooses the pairs that are trained on, and those alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import command, finish, run
from stores import cache_config, contents, make_loader, write_pairs

from fpocli import EvalConfig, UserError, cache, evaluate
from fpocli.store.reader import Store
from fpocli.training.where import pairs_where

CPU = torch.device("cpu")


def trained_pairs(loader, epochs=1):
    """The pairs of every step of an epoch, over all ranks."""
    steps = range(epochs * loader.steps_per_epoch)
    return [pair for step in steps for pair in loader.pairs(step).tolist()]


def test_the_columns_are_those_of_the_store(store_path):
    store, arrays = Store.open(store_path), contents(store_path)
    lengths, logp = np.diff(arrays["spans"]), arrays["ref/logp"]
    expected = {
        "margin > 0.05": arrays["ref/margin"] > 0.05,
        "chosen_logp < -30": logp[:, 0] < -30,
        "rejected_logp < -30": logp[:, 1] < -30,
        "prompt_tokens > 15": lengths[:, 0] > 15,
        "chosen_tokens > 12": lengths[:, 1] > 12,
        "rejected_tokens > 12": lengths[:, 2] > 12,
        "row < 5": arrays["source_row"] < 5,
        "source == 0": np.ones(store.pairs, bool),
        "margin > 0 and not chosen_tokens > 2 * rejected_tokens": (arrays["ref/margin"] > 0)
        & ~(lengths[:, 1] > 2 * lengths[:, 2]),
    }
    for condition, held in expected.items():
        np.testing.assert_array_equal(pairs_where(store, condition), held, condition)
    assert pairs_where(store, None) is None


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_an_epoch_has_the_chosen_pairs_once_and_the_same_are_held_out(store_path, data):
    store = Store.open(store_path)
    held = np.array(data.draw(st.lists(st.booleans(), min_size=store.pairs, max_size=store.pairs)))
    fraction = data.draw(st.sampled_from([0.0, 0.2, 0.5]))
    whole = make_loader(store, eval_fraction=fraction)
    some = make_loader(store, eval_fraction=fraction, where=held)
    kept = [pair for pair in sorted(trained_pairs(whole)) if held[pair]]
    assert some.training_pairs == len(kept)
    assert sorted(trained_pairs(some)) == kept
    for block in range(store.blocks):
        np.testing.assert_array_equal(some.held_out(block), whole.held_out(block))
    read = [
        pair
        for micro in some.evaluation(CPU, "train")
        for pair in micro.pairs[micro.pair_weights.numpy() > 0].tolist()
    ]
    assert sorted(read) == kept


def test_a_source_of_a_mixture_can_be_left_out(material, tmp_path):
    files = [write_pairs(tmp_path / f"{name}.jsonl", 9, seed) for seed, name in enumerate("ab")]
    data = list(map(str, files))
    store = cache(cache_config(material, tmp_path / "ref.zarr", layer=[], sae=[], data=data))
    loader = make_loader(store, eval_fraction=0.0, where=pairs_where(store, "source == 1"))
    assert sorted(trained_pairs(loader)) == np.flatnonzero(store.sources() == 1).tolist()


def test_a_run_trains_on_the_chosen_pairs(material, store_path, tmp_path):
    """As many steps as they make, and their mean margin of the reference."""
    store, arrays = Store.open(store_path), contents(store_path)
    condition = "margin > 0 and chosen_tokens < 20"
    out = tmp_path / "run"
    lines = run(material, out, cache=store_path, where=condition)
    held = pairs_where(store, condition)
    loader = make_loader(store, eval_fraction=0.2, where=held)
    train = [line for line in lines if line["split"] == "train"]
    assert len(train) == loader.steps_per_epoch > 0
    assert (arrays["ref/margin"][trained_pairs(loader)] > 0).all()
    result = evaluate(
        EvalConfig(model=str(out), cache=str(store_path), split="train", device="cpu")
    )
    assert result["pairs"] == loader.training_pairs


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("margin > 1e9", "holds for none of"),
        ("margins > 0", "has the unknown name margins"),
        ("margin", "where a comparison is needed"),
    ],
)
def test_a_condition_that_chooses_nothing_is_refused(
    material, store_path, tmp_path, condition, message
):
    done = finish(command(material, tmp_path / "run", cache=store_path, where=condition))
    assert done.returncode == 2 and message in done.stderr
    assert "hint:" in done.stderr and "Traceback" not in done.stderr


def test_what_is_left_after_holding_out_may_be_nothing(store_path):
    store = Store.open(store_path)
    held = np.zeros(store.pairs, bool)
    held[make_loader(store, eval_fraction=0.5).held_out(0)] = True
    loader = make_loader(store, eval_fraction=0.5, where=held)
    assert loader.training_pairs == loader.steps_per_epoch == 0
    with pytest.raises(UserError, match="holds for none of"):
        pairs_where(store, "row < 0")
