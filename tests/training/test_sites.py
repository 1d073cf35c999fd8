"""A store of many sites: training and evaluation at some of them, and a store without any."""

import pytest
import torch
from runs import command, finish, run
from safetensors.torch import load_file
from stores import cache_config, write_pairs

from fpocli import EvalConfig, InspectConfig, Store, UserError, cache, evaluate, inspect

MLP, FIRST, LAST = "layer_1.mlp_out", "layer_0.resid_post", "layer_3.resid_post"


@pytest.fixture(scope="module")
def stores(material, tmp_path_factory):
    """The same pairs in a store of three sites, of the last one alone, and without sites."""
    folder = tmp_path_factory.mktemp("stores")
    sae = str(material / "sae")
    sites = {"layer": [1, 0, 3], "site": ["mlp_out", "resid_post", "resid_post"], "sae": [sae] * 3}
    cache(cache_config(material, folder / "three.zarr", **sites))
    cache(cache_config(material, folder / "one.zarr"))
    cache(cache_config(material, folder / "none.zarr", layer=[], sae=[]))
    return folder


def weights(out):
    return load_file(out / "final/model.safetensors")


def test_one_site_of_three_trains_as_a_store_of_that_site_alone(material, stores, tmp_path):
    lines = {}
    for name, flags in (("three", ("--at", LAST)), ("one", ())):
        store = stores / f"{name}.zarr"
        lines[name] = run(material, tmp_path / name, "--no-bf16", *flags, cache=store)
    for one, other in zip(lines["three"], lines["one"], strict=True):
        for name in ("loss", "u", "distance_chosen", "distance_rejected", "missing"):
            assert one[name] == other[name], name
        assert one.get("gradient_norm") == other.get("gradient_norm")
    one, other = weights(tmp_path / "three"), weights(tmp_path / "one")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_sites_are_averaged_in_the_order_of_the_store(material, stores, tmp_path):
    store = stores / "three.zarr"
    one = run(material, tmp_path / "a", "--no-bf16", "--at", LAST, "--at", MLP, cache=store)
    other = run(material, tmp_path / "b", "--no-bf16", "--at", MLP, "--at", LAST, cache=store)
    assert [line["loss"] for line in one] == [line["loss"] for line in other]
    alone = run(material, tmp_path / "c", "--no-bf16", "--at", LAST, cache=store)
    assert one[-1]["distance_rejected"] != alone[-1]["distance_rejected"]


def test_evaluation_compares_features_at_the_sites_of_the_run(material, stores, tmp_path):
    store = str(stores / "three.zarr")
    run(material, tmp_path / "run", "--no-bf16", "--at", LAST, cache=store)

    def sites(*at):
        return list(
            evaluate(EvalConfig(model=str(tmp_path / "run"), cache=store, at=at))["distance"]
        )

    assert sites() == [LAST]
    assert sites(FIRST, MLP) == [MLP, FIRST]
    with pytest.raises(UserError, match=r"has no features at layer_2\.mlp_out") as error:
        sites("layer_2.mlp_out")
    assert LAST in error.value.hint


def test_an_unknown_site_is_refused_before_training(material, stores, tmp_path):
    words = command(material, tmp_path / "run", "--no-bf16", "--at", "layer_9.resid_post")
    words[words.index("--cache") + 1] = str(stores / "three.zarr")
    done = finish(words)
    assert done.returncode == 2
    assert "has no features at layer_9.resid_post" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_method_without_features_takes_no_site(material, store_path, tmp_path):
    done = finish(command(material, tmp_path / "run", "--no-bf16", "--at", LAST, method="dpo"))
    assert done.returncode == 2
    assert "dpo compares no features, so --at would have no effect" in done.stderr


@pytest.mark.parametrize(
    "method",
    [
        "sft",
        "tdpo2",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("dpo", "dpo_norm", "simpo")),
    ],
)
def test_a_store_without_saes_serves_all_methods_but_fpo(material, stores, tmp_path, method):
    """With the same numbers as a store that has features."""
    one, other = (
        run(material, tmp_path / name, "--no-bf16", method=method, cache=stores / f"{name}.zarr")
        for name in ("none", "one")
    )
    for line, same in zip(one, other, strict=True):
        assert line["loss"] == same["loss"]
    result = evaluate(
        EvalConfig(
            model=str(tmp_path / "none"),
            cache=str(stores / "none.zarr"),
            reference=str(material / "model"),
        )
    )
    assert "distance" not in result
    assert result["kl"]["chosen"] > 0


def test_fpo_on_a_store_without_saes_says_what_to_do(material, stores, tmp_path):
    words = command(material, tmp_path / "run", "--no-bf16")
    words[words.index("--cache") + 1] = str(stores / "none.zarr")
    done = finish(words)
    assert done.returncode == 2
    assert "fpo compares features, and" in done.stderr and "has none" in done.stderr
    assert "--layer" in done.stderr and "--method dpo_norm" in done.stderr


def test_a_store_without_saes_is_inspected_verified_and_repaired(material, tmp_path, capsys):
    path = tmp_path / "none.zarr"
    data = write_pairs(tmp_path / "pairs.jsonl", 12, seed=3)
    settings = {"layer": [], "sae": [], "data": str(data)}
    cache(cache_config(material, path, **settings))
    assert "no features" in capsys.readouterr().err
    assert inspect(InspectConfig(store=str(path), verify=True))["features"] == {}
    assert "no features" in capsys.readouterr().out
    assert inspect(InspectConfig(store=str(path), pair=3))["features"] == {}
    chunk = path / "ref/logp/c/1/0"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cache(cache_config(material, path, repair=True, **settings))
    assert chunk.read_bytes() == whole
    assert Store.open(path).sites == {}


def test_flags_of_sites_need_a_layer(material, tmp_path):
    with pytest.raises(UserError, match="--sae and --site need a --layer"):
        cache_config(material, tmp_path / "ref.zarr", layer=[])
    with pytest.raises(UserError, match="--sae and --site need a --layer"):
        cache_config(material, tmp_path / "ref.zarr", layer=[], sae=[], site=["mlp_out"])
