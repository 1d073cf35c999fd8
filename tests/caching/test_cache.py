"""The cache stage end to end: right numbers, resuming, refusals, independence of blocks."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import transformers
from stores import cache_config, contents, make_loader, set_attributes, write_pairs

from fpocli import UserError, cache
from fpocli.caching import block_scorer, open_store
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model import packing
from fpocli.model.language_model import LanguageModel, load_model
from fpocli.model.packing import pack
from fpocli.report.describe import describe
from fpocli.scoring.score import score
from fpocli.store.reader import Store
from fpocli.store.verify import find_damage
from fpocli.system.lock import WriterLock
from fpocli.system.model_folder import find_model
from fpocli.training.first_step import check_dtype_and_kernel

SITE = "layer_3.resid_post"


def test_stored_numbers_equal_plain_transformers_and_sae_lens(store_path):
    """In float32, for every pair, within 1e-4 nats of each sequence scored by itself."""
    network, sae = tiny.network("gemma2"), tiny.sae()
    arrays = contents(store_path)
    ids, spans = arrays["tokens"].astype(np.int64), arrays["spans"]
    index, value = (arrays[f"features/{SITE}/{name}"] for name in ("index", "value"))
    pooled_all = []
    for pair, (start, chosen, rejected, end) in enumerate(spans.tolist()):
        for side, (first, last) in enumerate(((chosen, rejected), (rejected, end))):
            sequence = torch.tensor(np.concatenate([ids[start:chosen], ids[first:last]]))[None]
            seen = []
            hook = network.model.norm.register_forward_pre_hook(lambda m, x, s=seen: s.append(x[0]))
            with torch.no_grad():
                logp = network(sequence, use_cache=False).logits.float().log_softmax(-1)
            hook.remove()
            predictors = slice(chosen - start - 1, sequence.shape[1] - 1)
            targets = sequence[0, chosen - start :, None]
            total = logp[0, predictors].gather(-1, targets).sum().item()
            assert arrays["ref/logp"][pair, side] == pytest.approx(total, abs=1e-4)
            pooled = sae.encode(seen[0][0, predictors]).double().mean(0).detach().numpy()
            pooled_all.append(pooled)
            used = value[pair, side] > 0
            own = np.sort(pooled)[::-1][: used.sum()]
            np.testing.assert_allclose(value[pair, side][used], own, atol=1e-3)
            np.testing.assert_allclose(
                value[pair, side][used], pooled[index[pair, side][used]], atol=1e-3
            )
            nonzero = arrays[f"features/{SITE}/nonzero"][pair, side]
            assert abs(int(nonzero) - (pooled > 0).sum()) <= 1
    mean = np.mean(pooled_all, 0)
    np.testing.assert_allclose(arrays[f"features/{SITE}/mean"], mean, atol=1e-4)
    frequency = (np.stack(pooled_all).reshape(-1, 2, tiny.FEATURES) > 0).sum(0)
    assert (np.abs(arrays[f"features/{SITE}/frequency"] - frequency) <= 1).all()


def test_cached_scores_equal_scores_computed_again(store_path, material):
    """Invariant 5 of method.md, however pairs are grouped."""
    store = Store.open(store_path)
    folder = find_model(str(material / "model"))
    model = load_model(folder, [Site.parse(SITE)], torch.float32, torch.device("cpu")).eval()
    encoders = {SITE: SparseEncoder(tiny.sae())}
    for block in range(store.blocks):
        tokens = store.tokens(block)
        rows = store.reference(block, tokens)
        for pair in range(len(tokens)):
            with torch.inference_mode():
                scores = score(model, encoders, pack([tokens.pair(pair)]))
            np.testing.assert_allclose(rows.logp[pair], scores.logp[0], atol=5e-5)
            pooled = scores.pooled[SITE][0].sort(-1, descending=True).values[:, :64]
            np.testing.assert_allclose(rows.features[SITE].value[pair], pooled, atol=1e-4)


def test_content_is_the_same_for_any_block_and_packed_length(material, tmp_path):
    results = []
    for number, (block, tokens) in enumerate(((8, 8192), (21, 8192), (4, 300), (1, 1))):
        path = tmp_path / f"{number}.zarr"
        cache(cache_config(material, path, block=block, packed_length=tokens))
        results.append(contents(path))
    for other in results[1:]:
        np.testing.assert_array_equal(other["tokens"], results[0]["tokens"])
        np.testing.assert_allclose(other["ref/logp"], results[0]["ref/logp"], atol=1e-4)
        name = f"features/{SITE}/value"
        np.testing.assert_allclose(other[name], results[0][name], atol=1e-3)


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_interrupted_caching_resumes_with_the_same_command(
    material, tmp_path, store_path, stop_after, monkeypatch
):
    """The content is equal to the bit, and finished blocks are not scored again."""
    path = tmp_path / "ref.zarr"
    scored = []
    real = block_scorer.score_block

    def stopping(*arguments, **settings):
        if len(scored) == stop_after:
            raise KeyboardInterrupt
        scored.append(arguments[3].source_row[0])
        return real(*arguments, **settings)

    monkeypatch.setattr(block_scorer, "score_block", stopping)
    with pytest.raises(KeyboardInterrupt):
        cache(cache_config(material, path))
    assert Store.open(path).meta["state"] == ("partial" if stop_after else "tokenised")
    stop_after = 99
    cache(cache_config(material, path))
    assert scored == [0, 8, 16]
    whole, resumed = contents(store_path), contents(path)
    assert whole.keys() == resumed.keys()
    for name, values in whole.items():
        np.testing.assert_array_equal(resumed[name], values, err_msg=name)


def test_caching_interrupted_while_it_writes_tokens_starts_over(material, tmp_path, monkeypatch):
    path = tmp_path / "ref.zarr"
    import zarr

    real = zarr.Group.create_array

    def stopping(group, name, **settings):
        if name == "ref/margin":
            raise KeyboardInterrupt
        return real(group, name, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(zarr.Group, "create_array", stopping)
        cache(cache_config(material, path))
    with pytest.raises(UserError, match="interrupted"):
        Store.open(path)
    assert cache(cache_config(material, path)).meta["state"] == "complete"


def test_the_same_command_twice_changes_nothing(material, store_path):
    before = contents(store_path)
    cache(cache_config(material, store_path))
    after = contents(store_path)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"top_k": "32"}, "k is 64 there, 32 here"),
        ({"value_dtype": "float16"}, "value_dtype"),
        ({"max_length": 30}, "limits.max_length is 2048 there, 30 here"),
        ({"dtype": "bfloat16"}, "model.dtype"),
        ({"chat_template": "gemma"}, "chat_template.name"),
        ({"limit": 20}, "data.limit"),
        ({"block": 4}, "block"),
        ({"model": "policy"}, "model.hash"),
        ({"distributions": "8"}, "distributions is None there"),
    ],
)
def test_other_settings_are_not_mixed_into_a_store(material, store_path, change, named):
    """A cache whose key leaves something out returns another model's numbers."""
    if "model" in change:
        change = {"model": str(material / change["model"])}
    with pytest.raises(UserError, match=f"made with other settings: .*{named}"):
        cache(cache_config(material, store_path, **change))


def test_changed_data_under_the_same_name_is_noticed(material, store_path, tmp_path):
    data = shutil.copy(material / "pairs.jsonl", tmp_path)
    path = shutil.copytree(store_path, tmp_path / "ref.zarr")
    cache(cache_config(material, path.with_name("own.zarr"), data=data))
    write_pairs(tmp_path / "pairs.jsonl", 21, seed=9)
    with pytest.raises(UserError, match=r"data\.fingerprint"):
        cache(cache_config(material, path.with_name("own.zarr"), data=data))


def test_all_features_and_float16_values(material, tmp_path, store_path):
    whole = cache(cache_config(material, tmp_path / "all.zarr", top_k="all"))
    half = cache(cache_config(material, tmp_path / "half.zarr", value_dtype="float16"))
    assert whole.sites[SITE]["k"] == tiny.FEATURES
    name = f"features/{SITE}/value"
    kept, every = contents(store_path)[name], contents(whole.path)[name]
    np.testing.assert_array_equal(every[..., :64], kept)
    short = contents(half.path)[name]
    assert short.dtype == np.float16
    np.testing.assert_array_equal(short, kept.astype(np.float16))


def test_a_value_too_large_for_float16_is_an_error(material, tmp_path):
    sae = tiny.sae("standard")
    with torch.no_grad():
        sae.W_enc.mul_(1e6)
    sae.save_model(tmp_path / "sae")
    settings = {"sae": [str(tmp_path / "sae")], "value_dtype": "float16"}
    with pytest.raises(UserError, match=r"the pair in row \d+ does not fit into float16"):
        cache(cache_config(material, tmp_path / "half.zarr", **settings))
    cache(cache_config(material, tmp_path / "ref.zarr", sae=settings["sae"]))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_several_sites_of_both_kinds(material, tmp_path, family):
    model = tiny.model_folder(tmp_path / "model", family)
    config = cache_config(
        material,
        tmp_path / "ref.zarr",
        model=str(model),
        layer=[0, 3, 3],
        site=["resid_post", "resid_post", "mlp_out"],
        sae=[str(material / "sae")] * 3,
        limit=4,
    )
    store = cache(config)
    assert list(store.sites) == ["layer_0.resid_post", "layer_3.resid_post", "layer_3.mlp_out"]
    tokens = store.tokens(0)
    features = store.reference(0, tokens).features
    network = LanguageModel(tiny.network(family), [Site.parse(site) for site in store.sites])
    encoders = {site: SparseEncoder(tiny.sae()) for site in store.sites}
    with torch.inference_mode():
        scores = score(network, encoders, pack([tokens.pair(2)]))
    for site, pooled in scores.pooled.items():
        largest = pooled[0].sort(-1, descending=True).values[:, :64]
        np.testing.assert_allclose(features[site].value[2], largest, atol=1e-3)


@pytest.fixture
def nan_model(tmp_path):
    """A model that returns NaN for every text with a 3 in it."""
    network = tiny.network("llama")  # whose head has weights of its own
    with torch.no_grad():
        network.model.embed_tokens.weight[tiny.tokenizer().encode("3")[0]] = torch.nan
    network.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    return str(tmp_path / "nan")


def data_with_nan(path, rows):
    lines = write_pairs(path, 21).read_text().splitlines()
    for row in rows:
        lines[row] = lines[row].replace('"prompt": "', '"prompt": "3')
    path.write_text("\n".join(lines))
    return str(path)


def test_non_finite_values_name_the_row(material, tmp_path, nan_model):
    data = data_with_nan(tmp_path / "pairs.jsonl", [9])
    with pytest.raises(UserError, match="row 9 is non-finite"):
        cache(cache_config(material, tmp_path / "ref.zarr", model=nan_model, data=data))


def test_pairs_with_non_finite_values_are_left_out(material, tmp_path, nan_model):
    """They are stored as missing, the other pairs are unchanged, and training skips them."""
    rows = [0, 9, 10, 20]
    data = data_with_nan(tmp_path / "pairs.jsonl", rows)
    config = cache_config(
        material, tmp_path / "ref.zarr", model=nan_model, data=data, drop_non_finite=True
    )
    store = cache(config)
    assert Store.open(store.path).non_finite == rows
    assert find_damage(store) == []
    arrays = contents(store.path)
    assert np.isnan(arrays["ref/margin"]).nonzero()[0].tolist() == rows
    assert (arrays[f"features/{SITE}/nonzero"][rows] == -1).all()
    lines = (tmp_path / "ref.zarr.dropped.jsonl").read_text().splitlines()
    listed = [json.loads(line) for line in lines]
    assert [row["row"] for row in listed] == rows
    kept = [row for row in range(21) if row not in rows]
    lines = Path(data).read_text().splitlines()
    (tmp_path / "kept.jsonl").write_text("\n".join(lines[row] for row in kept))
    alone = contents(
        cache(
            cache_config(
                material,
                tmp_path / "alone.zarr",
                model=nan_model,
                data=str(tmp_path / "kept.jsonl"),
            )
        ).path
    )
    np.testing.assert_allclose(arrays["ref/logp"][kept], alone["ref/logp"], atol=1e-4)
    for name in ("mean", "frequency"):
        name = f"features/{SITE}/{name}"
        np.testing.assert_allclose(arrays[name], alone[name], atol=1e-4)
    seen = []
    for fraction, world in ((0.0, 1), (0.3, 1), (0.3, 2)):
        for rank in range(world):
            loader = make_loader(store, eval_fraction=fraction, rank=rank, world=world)
            assert loader.training_pairs + loader.held_out_pairs == len(kept)
            trained = [
                pair for step in range(loader.steps_per_epoch) for pair in loader.pairs(step)
            ]
            device = torch.device("cpu")
            held_out = [
                p
                for micro in loader.evaluation(device)
                for p in micro.pairs[micro.pair_weights.numpy() > 0]
            ]
            seen += [held_out]
            assert len(trained) == loader.training_pairs
            if world == 1:
                assert sorted(trained + held_out) == kept
    assert sorted(seen[1]) == sorted(seen[2] + seen[3])


def test_a_model_that_fails_the_start_up_check_is_not_cached(material, tmp_path, monkeypatch):
    """tests/scoring/test_startup_check.py tests everything that the check finds."""

    def by_place(pairs, multiple):
        batch = packing.pack(pairs, multiple)
        return dataclasses.replace(batch, positions=torch.arange(len(batch.ids)))

    monkeypatch.setattr("fpocli.scoring.startup_check.pack", by_place)
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        cache(cache_config(material, tmp_path / "ref.zarr"))


def test_a_store_larger_than_the_free_disk_is_not_started(material, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="are free"):
        cache(cache_config(material, tmp_path / "ref.zarr"))
    assert not (tmp_path / "ref.zarr").exists()


def test_dropped_pairs_are_counted_and_rows_keep_their_numbers(material, tmp_path):
    rows = [json.loads(line) for line in (material / "pairs.jsonl").read_text().splitlines()[:5]]
    rows[1]["chosen"] = ""
    rows[3]["rejected"] = rows[3]["chosen"]
    data = tmp_path / "pairs.json"
    data.write_text(json.dumps(rows))
    store = cache(cache_config(material, tmp_path / "ref.zarr", data=str(data)))
    assert store.meta["pairs"] == {
        "read": 5,
        "kept": 3,
        "dropped": {"empty response": 1, "equal responses": 1},
    }
    assert contents(store.path)["source_row"].tolist() == [0, 2, 4]


def test_a_link_is_treated_as_the_folder_it_points_to(material, tmp_path):
    (tmp_path / "scratch").mkdir()
    link = tmp_path / "link.zarr"
    link.symlink_to("scratch")
    assert cache(cache_config(material, link)).path == tmp_path / "scratch"
    with WriterLock(tmp_path / "scratch"), pytest.raises(UserError, match="another process"):
        cache(cache_config(material, link))
    cache(cache_config(material, link, overwrite=True, limit=3))
    assert link.is_symlink() and Store.open(tmp_path / "scratch").pairs == 3


def test_what_allow_permits_is_recorded_in_the_store(material, tmp_path):
    path = tmp_path / "ref.zarr"
    cache(cache_config(material, path))
    (path / "blocks/digest/c/1").unlink()
    set_attributes(path, state="partial")
    store = cache(cache_config(material, path, dtype="bfloat16", allow=["dtype"]))
    assert store.meta["allowed"] == {"dtype": ["bfloat16"]}
    assert describe(store)["allowed"] == {"dtype": ["bfloat16"]}
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(UserError, match="dtype float32 and bfloat16 in the store"):
            check_dtype_and_kernel(store, dtype, "fpo_by_sequence", [])
    check_dtype_and_kernel(store, "float32", "fpo_by_sequence", ["dtype"])


def test_a_second_writer_is_refused(material, tmp_path):
    path = tmp_path / "ref.zarr"
    with WriterLock(path), pytest.raises(UserError, match="another process is writing"):
        cache(cache_config(material, path))
    cache(cache_config(material, path))
    assert not path.with_name("ref.zarr.lock").exists()


@pytest.mark.parametrize("name", ["Granite", "Cohere"])
def test_a_model_that_scales_its_logits_is_refused(material, tmp_path, name):
    """Its log-probabilities would be wrong without an error."""
    config = getattr(transformers, f"{name}Config")(
        vocab_size=tiny.VOCABULARY,
        hidden_size=tiny.WIDTH,
        intermediate_size=48,
        num_hidden_layers=tiny.LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        **({"logits_scaling": 8.0} if name == "Granite" else {"logit_scale": 0.25}),
    )
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    network.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="does not compute what transformers computes"):
        cache(cache_config(material, tmp_path / "ref.zarr", model=str(tmp_path / "model")))


# -- mistakes that are found before a model is read ----------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "pairs.txt"}, "is not one of .jsonl, .json, .csv, .parquet"),
        ({"data": "gone.jsonl"}, "does not exist"),
        (
            {"data": "sharegpt.jsonl"},
            "line 1: missing field, rejected; it has conversations: empty",
        ),
        ({"layer": [1, 1], "sae": ["a", "b"]}, "a site is named twice"),
    ],
)
def test_mistakes_in_flags_and_data_are_found_before_any_model_is_read(
    material, tmp_path, monkeypatch, changes, message
):
    """Neither the model nor the SAE exists, and nothing looks for them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.txt").write_text("prompt,chosen,rejected")
    (tmp_path / "sharegpt.jsonl").write_text('{"conversations": [], "chosen": {"from": "gpt"}}')
    missing = {"model": "nowhere/model", "sae": ["nowhere/sae"]}
    with pytest.raises(UserError, match=message):
        cache(cache_config(material, tmp_path / "ref.zarr", **(missing | changes)))


def test_pairs_that_do_not_fit_are_named_when_none_is_left(material, tmp_path):
    with pytest.raises(UserError, match=r"21 prompt too long; the first is .*pairs.jsonl, line 1"):
        cache(cache_config(material, tmp_path / "ref.zarr", max_prompt_length=1))


# -- features that are stored for every response ---------------------------------------------------


def test_keep_stores_the_named_features_of_every_response(material, tmp_path):
    site = f"layer_{tiny.LAYERS - 1}.resid_post"
    file = tmp_path / "keep.yaml"
    file.write_text(f"{site}: {{7: 0.0, groups: {{some: [95, 1, 2]}}}}")
    settings = {"top_k": "3", "keep": str(file)}
    path = tmp_path / "ref.zarr"
    store = cache(cache_config(material, path, **settings))
    whole = cache(cache_config(material, tmp_path / "all.zarr", top_k="all"))
    assert store.sites[site]["keep"] == [1, 2, 7, 95]
    for block in range(store.blocks):
        tokens = store.tokens(block)
        kept = store.reference(block, tokens).features[site]
        every = whole.reference(block, tokens).features[site]
        dense = np.zeros((len(tokens), 2, tiny.FEATURES + 1), np.float32)
        np.put_along_axis(dense, np.minimum(every.index, tiny.FEATURES), every.value, -1)
        np.testing.assert_array_equal(kept.kept_value, dense[..., [1, 2, 7, 95]])
    assert find_damage(store) == []
    # A chunk in the place of another has the right checksum, but not the right digest.
    chunks = path / f"features/{site}/kept/c"
    (chunks / "0/0/0").write_bytes((chunks / "1/0/0").read_bytes())
    assert "blocks/kept" in find_damage(store)[0].message
    cache(cache_config(material, path, repair=True, **settings))
    assert find_damage(Store.open(path)) == []
    (chunks / "2/0/0").unlink()
    assert "chunk 2 is missing" in find_damage(store)[0].message
    file.write_text(f"{site}: {{7: 0.0}}")
    with pytest.raises(UserError, match="keep"):
        cache(cache_config(material, path, **settings))
    file.write_text("layer_0.resid_post: {7: 0.0}")
    with pytest.raises(UserError, match=r"layer_0\.resid_post, which is not a site"):
        cache(cache_config(material, path, **settings))


def test_the_id_at_neuronpedia_is_kept_where_sae_lens_knows_it(material, tmp_path):
    folder = tmp_path / "sae"
    sae = tiny.sae()
    sae.save_model(folder)
    before = cache_config(material, tmp_path / "before.zarr", sae=[str(folder)])
    (site,) = cache(before).sites
    sae.cfg.metadata.neuronpedia_id = "tiny/3-res"
    sae.save_model(folder)
    config = cache_config(material, tmp_path / "ref.zarr", sae=[str(folder)])
    assert cache(config).neuronpedia(site) == "tiny/3-res"
    # It is no part of the content: a store that was made before it was known is resumed.
    assert cache(before).neuronpedia(site) is None


def test_a_lock_that_is_lost_while_tokenising_deletes_nothing(material, tmp_path, monkeypatch):
    out = tmp_path / "ref.zarr"
    cache(cache_config(material, out, block=8))
    tokenise = open_store._tokenise

    def slow(*arguments):
        found = tokenise(*arguments)
        (tmp_path / "ref.zarr.lock").unlink()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(open_store, "_tokenise", slow)
        with pytest.raises(UserError, match="was removed while this process was writing"):
            cache(cache_config(material, out, block=4, overwrite=True))
    store = Store.open(out)
    assert store.meta["state"] == "complete" and store.block_size == 8
