"""Training with the reference in memory: methods that need its distribution, and its sharding."""

import numpy as np
import pytest
import tiny
import torch
from naive_tdpo2 import follow
from packed import random_pairs
from processes import results, together
from runs import read, run, same
from stores import contents, make_loader

from fpocli.config import TrainConfig
from fpocli.features.site import Site
from fpocli.model.language_model import FrozenReference
from fpocli.model.packing import pack
from fpocli.store.reader import Store
from fpocli.training.deepspeed_config import deepspeed_config
from fpocli.training.engine import shard, start_processes


def test_tdpo2_equals_a_naive_loop_in_plain_pytorch(material, store_path, tmp_path):
    """With the logits of both models, each sequence by itself; the KL acts from the second step
    on."""
    lines = run(material, tmp_path / "run", "--no-bf16", method="tdpo2", alpha=2)
    loader, arrays = make_loader(Store.open(store_path)), contents(store_path)
    network, reference = tiny.network("gemma2"), tiny.network("gemma2")
    follow(lines[1:-1], loader, arrays, network, reference, 1e-3)
    assert lines[-1]["kl_rejected"] > 1e-4 and abs(lines[-1]["delta"]) > 1e-6


@pytest.mark.parametrize(
    "method",
    ["tdpo2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tdpo1", "simpo_kl"))],
)
def test_kl_methods_with_a_whole_and_a_sharded_reference(material, store_path, tmp_path, method):
    """ZeRO 3 on two processes shards the reference as it does the policy."""
    whole = run(material, tmp_path / "whole", "--no-bf16", method=method, zero=2)
    sharded = run(material, tmp_path / "sharded", "--no-bf16", method=method, zero=3, processes=2)
    same(sharded, whole, 5e-5)
    assert whole[0]["kl_chosen"] == whole[0]["kl_rejected"] == whole[0]["delta"] == 0
    if method != "simpo_kl":
        assert whole[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert whole[-1]["kl_chosen"] > 1e-4


@pytest.mark.slow
def test_a_bfloat16_reference_alongside_the_policy(material, store_path, tmp_path):
    settings = {"method": "tdpo1", "model": material / "policy"}
    one = run(material, tmp_path / "one", **settings)
    three = run(material, tmp_path / "three", zero=3, processes=2, **settings)
    assert one[0]["kl_chosen"] > 0.01, "the reference is the store's, not the starting weights"
    same(three, one, 1e-2)


def test_measured_kl_of_a_method_that_does_not_need_it(baseline, material, tmp_path):
    """Measuring held-out pairs every second step changes nothing in training."""
    lines = run(material, tmp_path / "run", "--no-bf16", "--measure-kl", eval_every=2)
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 2, 4, 5]
    assert lines[0]["kl_chosen"] == 0 and lines[-1]["kl_chosen"] > 1e-4
    train = [line for line in lines if line["split"] == "train"]
    assert "kl_chosen" not in train[0]
    same(train, [line for line in read(baseline) if line["split"] == "train"], 1e-6)


def compare_sharded() -> None:
    """In each process of two: the same batches through a whole and a sharded reference."""
    start_processes(torch.device("cpu"))
    batch, site = pack(random_pairs(4)), Site(1, "mlp_out")
    whole = FrozenReference(tiny.network("gemma2"), [site])
    config = deepspeed_config(TrainConfig(cache="unused", zero=3, bf16=False))
    # DeepSpeed keeps small parameters whole once they were gathered, and these all are small.
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine = shard(FrozenReference(tiny.network("gemma2"), [site]), config)
    for _ in range(3):
        one, other = whole(batch), engine(batch)
        assert torch.equal(one.final, other.final)
        assert torch.equal(one.states[str(site)], other.states[str(site)])
    own = sum(p.ds_tensor.numel() for p in engine.module.parameters())
    held = sum(p.numel() for p in engine.module.parameters())
    total = sum(p.numel() for p in whole.parameters())
    assert held < 0.1 * total and own < 0.6 * total, (held, own, total)
    print("compared")


def test_each_rank_holds_its_part_of_a_sharded_reference():
    """Its gathered hidden states equal those of an unsharded model, bit for bit."""
    for done in results(*together([], 2, main=compare_sharded)):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.endswith("compared\n")
