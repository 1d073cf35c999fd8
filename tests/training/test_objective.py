"""Invariant 1 of method.md: where the policy is the reference, u and D are 0 for every pair."""

import copy
import math
import shutil

import numpy as np
import pytest
import tiny
import torch
from runs import run, same
from stores import cache_config, make_loader

from fpocli import cache
from fpocli.config import TrainConfig
from fpocli.features.pretrained import load_encoder
from fpocli.features.site import Site
from fpocli.features.weights import FeatureWeights, load_feature_weights
from fpocli.model.language_model import FrozenReference, load_model
from fpocli.scoring.score import score
from fpocli.store.reader import Store
from fpocli.system.errors import UserError
from fpocli.system.model_folder import find_model
from fpocli.training.held_out import held_out_means
from fpocli.training.objective import objective, shares_of_groups
from fpocli.training.run_folder import recorded_weights

CPU = torch.device("cpu")


@pytest.fixture(params=tiny.FAMILIES)
def stage(request, material, tmp_path):
    """A store of two sites, and its model and SAEs loaded anew."""
    path = tiny.model_folder(tmp_path / "model", request.param)
    config = cache_config(
        material,
        tmp_path / "ref.zarr",
        model=str(path),
        layer=[1, 3],
        site=["mlp_out", "resid_post"],
        sae=[str(material / "sae")] * 2,
        top_k="55",
    )
    store = cache(config)
    sites = [Site.parse(name) for name in store.sites]
    model = load_model(find_model(str(path)), sites, torch.float32, CPU).eval()
    return store, model, {name: load_encoder(str(material / "sae"), CPU) for name in store.sites}


def loader(store, packed_length: int, **changes):
    """All 21 pairs in one step, in a different order for each packed length."""
    settings = {"batch_size": 21, "eval_fraction": 0.0, "seed": packed_length}
    return make_loader(store, **(settings | {"packed_length": packed_length} | changes))


def first_step(loader):
    """The packed sequences of the first step."""
    return next(iter(loader.steps(0, 1, CPU)))


@pytest.mark.parametrize("packed_length", [1, 300, 5000])
def test_step_0_for_any_packing_order_and_ranks(stage, packed_length):
    store, model, encoders = stage
    settings = TrainConfig(cache="unused")
    seen = 0
    for micro in first_step(loader(store, packed_length)):
        with torch.no_grad():
            loss, metrics = objective(
                score(model, encoders, micro.batch), micro.reference, encoders, settings
            )
        assert metrics["u"].abs().max() < 1e-6
        assert metrics["distance_chosen"].max() < 1e-8
        assert metrics["distance_rejected"].max() < 1e-8
        assert torch.allclose(loss, torch.full_like(loss, math.log(2)), atol=1e-6)
        assert (metrics["reward_accuracy"] == 0.5).all(), "every reward is 0: ties"
        assert (metrics["reward_ties"] == 1).all()
        seen += len(loss)
    assert seen == 21


@pytest.mark.parametrize("constraint", ["features", "none"])
def test_every_scalar_of_the_settings_reaches_the_loss(stage, constraint):
    store, model, encoders = stage
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.2)
    settings = TrainConfig(
        cache="unused", reward="simpo", constraint=constraint, alpha=3.0, beta=1.5, gamma=0.7,
        sft_weight=0.3, label_smoothing=0.2,
    )  # fmt: skip
    for alpha in (None, 7.0):
        for micro in first_step(loader(store, 300)):
            with torch.no_grad():
                loss, found = objective(
                    score(model, encoders, micro.batch), micro.reference, encoders, settings, {},
                    alpha,
                )  # fmt: skip
            average = torch.stack(
                [found["average_logp_chosen"], found["average_logp_rejected"]]
            ).double()
            u = 1.5 * (average[0] - average[1]) - 0.7
            if constraint == "features":
                apart = (found["distance_rejected"] - found["distance_chosen"]).double()
                u = u - (alpha or 3.0) * 1.5 * apart
            right, wrong = u.sigmoid().log(), (-u).sigmoid().log()
            expected = -0.8 * right - 0.2 * wrong - 0.3 * average[0]
            assert torch.allclose(found["u"].double(), u, rtol=1e-4, atol=1e-5)
            assert torch.allclose(loss.double(), expected, rtol=1e-4, atol=1e-5)


def test_evaluation_is_the_mean_over_pairs_however_they_are_batched(stage):
    store, model, encoders = stage
    policy = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    settings = TrainConfig(cache="unused")
    results = [
        held_out_means(
            policy,
            encoders,
            loader(store, size, eval_fraction=0.4).evaluation(CPU),
            settings,
            {},
            FrozenReference(model.network, []),
            "held-out pairs",
        )
        for size in (1, 400)
    ]
    for name in results[0]:
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-4, abs=1e-5)
    assert results[0]["kl_chosen"] > 0.01
    # The margin of Figure 3 is a mean of absolute values, not the absolute value of a mean.
    difference = results[0]["kl_rejected"] - results[0]["kl_chosen"]
    assert results[0]["kl_margin"] > 1.05 * abs(difference)


def test_every_pair_once_per_epoch_and_as_many_packed_sequences_on_every_rank(store_path):
    store = Store.open(store_path)
    for world, packed_length, batch_size in ((1, 200, 4), (2, 200, 5), (3, 400, 4), (4, 900, 32)):
        ranks = [
            loader(store, packed_length, batch_size=batch_size, world=world, rank=rank,
                   eval_fraction=0.2, seed=0)
            for rank in range(world)
        ]  # fmt: skip
        steps = ranks[0].steps_per_epoch
        pairs = []
        for step, work in enumerate(
            zip(*(rank.steps(0, steps, CPU) for rank in ranks), strict=True)
        ):
            assert len({len(micros) for micros in work}) == 1
            weights = torch.cat([m.pair_weights for micros in work for m in micros])
            assert weights.sum().item() == pytest.approx(1)
            assert (weights > 0).sum() == len(ranks[0].pairs(step))
            rows = [m for micros in work for m in micros if m.pair_weights.sum() > 0]
            assert all(len(m.pair_weights) == 1 or len(m.batch.ids) <= packed_length for m in rows)
            pairs += ranks[0].pairs(step).tolist()
        held_out = [pair for block in range(store.blocks) for pair in ranks[0].held_out(block)]
        assert len(held_out) == ranks[0].held_out_pairs == 4
        assert sorted([*pairs, *held_out]) == list(range(store.pairs))
        second = [ranks[0].pairs(steps + s).tolist() for s in (0, 1)]
        assert second[0] != ranks[0].pairs(0).tolist(), "another order in the second epoch"


def test_the_loader_gives_what_the_store_holds(store_path):
    """Ids, reference log-probabilities and features of each pair of a step, in its order."""
    store = Store.open(store_path)
    seen = []
    for micro in first_step(loader(store, 500)):
        for place, (start, *_, end) in enumerate(micro.batch.spans.tolist()):
            ids = micro.batch.ids[start:end].numpy()
            (pair,) = (
                number
                for number in range(store.pairs)
                if np.array_equal(np.concatenate(store_pair(store, number)), ids)
            )
            block, row = divmod(pair, store.block_size)
            reference = store.reference(block, store.tokens(block))
            assert torch.equal(micro.reference.logp[place], torch.from_numpy(reference.logp[row]))
            (site,) = store.sites
            stored = reference.features[site].value[row]
            assert np.array_equal(micro.reference.features[site].value[place], stored)
            seen.append(pair)
    assert sorted(seen) == list(range(store.pairs))


def store_pair(store, number: int):
    """Token ids of prompt, chosen and rejected of a pair of the store."""
    block, row = divmod(number, store.block_size)
    pair = store.tokens(block).pair(row)
    return pair.prompt, pair.chosen, pair.rejected


def test_several_sites_count_as_their_mean(stage):
    """Table 7: delta is the mean of the sites' delta."""
    store, model, encoders = stage
    settings = TrainConfig(cache="unused")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        micro = first_step(loader(store, 500))[0]
        scores = score(model, encoders, micro.batch)
        _, both = objective(scores, micro.reference, encoders, settings)
        alone = [
            objective(scores, micro.reference, {site: encoders[site]}, settings)[1]
            for site in encoders
        ]
    for name in ("distance_chosen", "distance_rejected", "delta", "missing", "overlap"):
        mean = (alone[0][name] + alone[1][name]) / 2
        assert torch.allclose(both[name], mean, atol=1e-6), name
    assert not torch.allclose(alone[0]["delta"], alone[1]["delta"])


def test_pairs_are_shuffled_inside_a_window_of_blocks(store_path, monkeypatch):
    monkeypatch.setattr("fpocli.training.pair_loader._WINDOW", 1)
    store = Store.open(store_path)
    one = loader(store, 1)
    order = one.pairs(0)
    blocks = order // store.block_size
    changes = (blocks[1:] != blocks[:-1]).sum()
    assert changes == store.blocks - 1, "with a window of one, block follows block"
    assert (np.diff(order) != 1).sum() > store.blocks, "and inside a block pairs are shuffled"


def test_an_error_of_the_thread_that_reads_reaches_the_loop(store_path, tmp_path):
    damaged = tmp_path / "ref.zarr"
    shutil.copytree(store_path, damaged)
    (damaged / "ref" / "logp" / "c" / "0" / "0").write_bytes(b"nothing")
    with pytest.raises(UserError, match="ref/logp"):
        list(loader(Store.open(damaged), 500).steps(0, 1, CPU))


# -- named features (section 5.3) ------------------------------------------------------------------


def quiet_features(store, model, encoder, site, micro) -> list[int]:
    """Features that are active in the policy but in neither side's top 2 of any response."""
    scores = score(model, {site: encoder}, micro.batch)
    pooled, reference = scores.pooled[site], micro.reference.features[site]
    loud = set(pooled.topk(2).indices.ravel().tolist())
    loud |= set(reference.index[..., :2].ravel().tolist())
    active = (pooled > 0).all(1).all(0).nonzero().ravel().tolist()
    return [feature for feature in active if feature not in loud]


def test_a_named_feature_outside_both_top_k_changes_the_gradient(stage):
    store, model, encoders = stage
    site, encoder = next(iter(encoders.items()))
    (micro,) = first_step(loader(store, 5000))
    policy = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    quiet = quiet_features(store, policy, encoder, site, micro)[:3]
    assert quiet, "the tiny model has features of middling activation"
    weight = torch.ones(tiny.FEATURES)
    weight[quiet] = 1000.0
    none = torch.zeros(tiny.FEATURES, dtype=torch.int8)
    found = []
    for named in ([], quiet):
        weights = {site: FeatureWeights(weight, none, torch.tensor(named, dtype=torch.int64), {})}
        settings = TrainConfig(cache="unused", k=2, alpha=50.0)
        policy.zero_grad()
        scores = score(policy, {site: encoder}, micro.batch)
        loss, metrics = objective(scores, micro.reference, {site: encoder}, settings, weights)
        loss.mean().backward()
        gradient = torch.cat([p.grad.ravel() for p in policy.parameters() if p.grad is not None])
        found.append((metrics["distance_rejected"], gradient))
    (before, small), (after, large) = found
    assert (after > before).any(), "D counts what was named"
    assert (large - small).norm() > 0.01 * small.norm()


def test_with_keep_the_distance_of_named_features_is_exact(material, tmp_path):
    """The store holds two features of each response, and the named ones beside them."""
    site = f"layer_{tiny.LAYERS - 1}.resid_post"
    named = [1, 2, 4, 5, 7, 50, 95]
    file = tmp_path / "weights.yaml"
    group = "groups: {some: [1, 2, 4], others: {features: [5, 7, 50, 95], weight: 3}}"
    file.write_text(f"{site}: {{{group}}}")
    policy = load_model(
        find_model(str(material / "policy")), [Site.parse(site)], torch.float32, CPU
    )
    original = load_model(
        find_model(str(material / "model")), [Site.parse(site)], torch.float32, CPU
    )
    encoders = {site: load_encoder(str(material / "sae"), CPU)}
    (weights,) = load_feature_weights(str(file), {site: tiny.FEATURES}).values()
    settings = TrainConfig(cache="unused", k=2)
    for keep in (str(file), None):
        config = cache_config(material, tmp_path / f"{keep is None}.zarr", top_k="2", keep=keep)
        (micro,) = first_step(loader(cache(config), 5000))
        with torch.no_grad():
            scores = score(policy, encoders, micro.batch)
            exact = score(original, encoders, micro.batch).pooled[site]
            arguments = (scores, micro.reference, encoders, settings, {site: weights})
            metrics = objective(*arguments)[1]
        change = (scores.pooled[site] - exact)[..., named].double()
        squares = (change**2 / 2).numpy()
        unweighted = {"some": squares[..., :3].sum(-1), "others": squares[..., 3:].sum(-1)}
        for name, expected in unweighted.items():
            for column, side in enumerate(("chosen", "rejected")):
                actual = metrics[f"group.{name}.distance_{side}"].numpy()
                if keep:
                    np.testing.assert_allclose(actual, expected[:, column], rtol=1e-4, atol=1e-9)
                else:
                    assert (actual <= expected[:, column] * (1 + 1e-4) + 1e-9).all()
                    assert (actual < 0.9 * expected[:, column]).any(), "a lower bound only"
                share = metrics[f"group.{name}.part_{side}"].numpy()
                omega = 3 if name == "others" else 1
                np.testing.assert_allclose(share, omega * actual, rtol=1e-5, atol=1e-12)


def test_shares_of_groups_are_parts_of_the_mean_distance():
    means = {
        "distance_chosen": 2.0,
        "distance_rejected": 0.0,
        "group.a.distance_chosen": 0.25,
        "group.a.part_chosen": 0.5,
        "group.a.part_rejected": 0.0,
        "group.part_1.distance_chosen": 1.0,
        "group.part_1.part_chosen": 1.0,
    }
    shares = shares_of_groups(means)
    assert shares["group.a.share_chosen"] == 0.25 and shares["group.a.share_rejected"] == 0.0
    assert shares["group.part_1.share_chosen"] == 0.5
    assert set(shares) == {
        *("distance_chosen", "distance_rejected", "group.a.distance_chosen"),
        *("group.a.share_chosen", "group.a.share_rejected"),
        *("group.part_1.distance_chosen", "group.part_1.share_chosen"),
    }


def test_weights_by_the_logits_in_training_and_after_a_resume(material, store_path, tmp_path):
    """They are those of the starting weights, which ZeRO-3 has partitioned; no file is recorded."""
    settings = {"feature_weights": "logits", "save_every": 2, "zero": 3}
    whole = run(material, tmp_path / "run", "--no-bf16", **settings)
    plain = run(material, tmp_path / "plain", "--no-bf16")
    assert whole[-1]["distance_rejected"] != plain[-1]["distance_rejected"]
    assert recorded_weights(tmp_path / "run") is None
    shutil.rmtree(tmp_path / "run/final")
    same(run(material, tmp_path / "run", "--no-bf16", **settings), whole, 1e-6)
