"""The reference's next-token distributions, as fpo cache stores them.

Shapes: M scored positions, n tokens, V vocabulary.
"""

import json

import numpy as np
import pytest
import tiny
import torch
from rich.filesize import decimal
from stores import cache_config, contents

from fpocli import UserError, cache
from fpocli.caching import cache as caching_stage
from fpocli.caching import open_store
from fpocli.model import language_model
from fpocli.report.describe import describe
from fpocli.store import distribution_rows
from fpocli.store.reader import Store
from fpocli.store.schema import raw_bytes
from fpocli.store.verify import find_damage

V = tiny.VOCABULARY
# Any model will do: no SAE.
NO_SITES = {"layer": [], "sae": []}


def plain_distributions(network, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """log-probabilities at every scored position by plain transformers, each sequence by itself:
    float64 [M, V]."""
    ids, found = arrays["tokens"].astype(np.int64), []
    for start, chosen, rejected, end in arrays["spans"].tolist():
        for first, last in ((chosen, rejected), (rejected, end)):
            sequence = torch.tensor(np.concatenate([ids[start:chosen], ids[first:last]]))[None]
            with torch.no_grad():
                logits = network(sequence, use_cache=False).logits[0].double()
            found.append(logits[chosen - start - 1 : -1].log_softmax(-1))
    return torch.cat(found).numpy()


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def made(material, tmp_path_factory, request):
    """Stores of 8 tokens and of all, and what plain transformers gives; with soft-caps and sliding
    windows in Gemma."""
    folder = tmp_path_factory.mktemp(request.param)
    model = str(tiny.model_folder(folder / "model", request.param))
    stores = {
        n: cache(
            cache_config(material, folder / f"{n}.zarr", model=model, distributions=n, **NO_SITES)
        )
        for n in ("8", "all")
    }
    network = tiny.network(request.param)
    return stores, plain_distributions(network, contents(stores["8"].path))


def test_every_position_equals_plain_transformers(made):
    stores, expected = made
    whole = stores["all"].top_tokens(range(21))
    assert whole.ids is None and np.isneginf(whole.rest).all()
    np.testing.assert_allclose(whole.logp, expected, atol=1e-4)
    few = stores["8"].top_tokens(range(21))
    np.testing.assert_allclose(few.logp, -np.sort(-expected, 1)[:, :8], atol=1e-4)
    np.testing.assert_allclose(
        few.logp, np.take_along_axis(expected, few.ids.astype(np.int64), 1), atol=1e-4
    )
    others = expected.copy()
    np.put_along_axis(others, few.ids.astype(np.int64), -np.inf, 1)
    np.testing.assert_allclose(few.rest, np.log(np.exp(others).sum(1)), atol=1e-4)


def test_they_hold_the_scored_tokens_as_well(made):
    """The stored log-probabilities of the responses' own tokens sum to ref/logp."""
    store = made[0]["all"]
    arrays = contents(store.path)
    spans, rows = arrays["spans"], arrays["ref/top/rows"]
    for pair in range(store.pairs):
        for side in (0, 1):
            targets = arrays["tokens"][slice(*spans[pair, side + 1 : side + 3])]
            own = arrays["ref/top/logp"][slice(*rows[pair, side : side + 2])]
            total = np.take_along_axis(own, targets[:, None].astype(np.int64), 1).sum()
            np.testing.assert_allclose(total, arrays["ref/logp"][pair, side], rtol=1e-5)


def test_inspect_shows_how_much_they_cover(made):
    stores, expected = made
    mass = np.exp(-np.sort(-expected, 1)[:, :8]).sum(1)
    shown = describe(stores["8"])["distributions"]
    assert {name: shown[name] for name in ("n", "dtype", "vocabulary", "positions")} == {
        "n": 8,
        "dtype": "float32",
        "vocabulary": V,
        "positions": len(mass),
    }
    assert shown["coverage"]["mean"] == pytest.approx(mass.mean(), abs=1e-5)
    assert shown["coverage"]["5%"] == pytest.approx(np.percentile(mass, 5), abs=2e-3)
    whole = describe(stores["all"])["distributions"]
    assert whole["coverage"]["mean"] == 1 and whole["coverage"]["5%"] > 0.999
    json.dumps(shown)


def test_other_content_is_as_without_them(material, store_path, tmp_path):
    """The fingerprint of a store without distributions does not know of them."""
    store = cache(cache_config(material, tmp_path / "ref.zarr", distributions="8"))
    plain, arrays = contents(store_path), contents(store.path)
    assert set(arrays) - set(plain) == {
        f"ref/top/{name}" for name in ("ids", "logp", "rest", "rows", "digest")
    }
    for name, values in plain.items():
        np.testing.assert_array_equal(arrays[name], values, err_msg=name)
    assert "distributions" not in Store.open(store_path).meta
    with pytest.raises(UserError, match=r"distributions is \{.*there, None here"):
        cache(cache_config(material, store.path))
    with pytest.raises(UserError, match=r"distributions\.n is 8 there, 9 here"):
        cache(cache_config(material, store.path, distributions="9"))
    with pytest.raises(UserError, match=r"distributions\.dtype is float32 there"):
        cache(cache_config(material, store.path, distributions="8", distribution_dtype="float16"))


def test_pairs_with_non_finite_values_are_left_out(material, tmp_path):
    """They are stored as missing, and the other pairs are read as if they were not there."""
    network = tiny.network("llama")  # whose head has weights of its own
    with torch.no_grad():
        network.model.embed_tokens.weight[tiny.tokenizer().encode("3")[0]] = torch.nan
    network.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    lines = (material / "pairs.jsonl").read_text().splitlines()
    for row in (0, 9, 20):
        lines[row] = lines[row].replace('"prompt": "', '"prompt": "3')
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(lines))
    settings = {"model": str(tmp_path / "nan"), "data": str(data), **NO_SITES}
    store = cache(
        cache_config(
            material, tmp_path / "s.zarr", distributions="8", drop_non_finite=True, **settings
        )
    )
    assert store.non_finite == [0, 9, 20] and find_damage(store) == []
    arrays = contents(store.path)
    for begin, _, end in arrays["ref/top/rows"][[0, 9, 20]]:
        assert np.isnan(arrays["ref/top/logp"][begin:end]).all()
    assert np.flatnonzero(arrays["ref/top/digest"] == 0).tolist() == [0, 9, 20]
    kept = [pair for pair in range(21) if pair not in (0, 9, 20)]
    expected = plain_distributions(network, arrays)
    expected = expected[np.isfinite(expected).all(1)]
    np.testing.assert_allclose(
        store.top_tokens(kept).logp, -np.sort(-expected, 1)[:, :8], atol=1e-4
    )
    assert describe(store)["distributions"]["coverage"]["mean"] == pytest.approx(
        np.exp(-np.sort(-expected, 1)[:, :8]).sum(1).mean(), abs=1e-4
    )


def test_the_plan_of_bytes_is_not_exceeded(made):
    for store in made[0].values():
        on_disk = sum(file.stat().st_size for file in store.path.rglob("*") if file.is_file())
        assert on_disk < raw_bytes(store.meta)


def test_the_plan_names_the_distributions(material, tmp_path, capsys):
    store = cache(cache_config(material, tmp_path / "ref.zarr", distributions="8", limit=3))
    rows = store.meta["distribution_rows"]["scored"]
    share = rows * (8 * 8 + 4) + 3 * (24 + 8)
    printed = " ".join(capsys.readouterr().err.split())
    assert f"{decimal(share)} of it the 8 likeliest next tokens; " in printed


@pytest.mark.parametrize(
    ("limit", "hint"), [(160_000, "use --block 2"), (1000, "use a smaller --distributions")]
)
def test_blocks_that_take_too_much_memory_are_refused(material, tmp_path, monkeypatch, limit, hint):
    """Before the store is begun; the block of the hint is taken."""
    for module in (distribution_rows, open_store):
        monkeypatch.setattr(module, "LARGEST_BLOCK", limit)
    settings = {"distributions": "all", "distribution_dtype": "float16"}
    out = tmp_path / "ref.zarr"
    with pytest.raises(UserError, match="all next tokens of a block of 8 pairs take") as error:
        cache(cache_config(material, out, **settings))
    assert error.value.hint == hint and not out.exists()
    if "block" in hint:
        cache(cache_config(material, out, block=int(hint.split()[-1]), **settings))


@pytest.mark.parametrize("number", ["-1", "8.5", "some"])
def test_what_is_no_number_of_tokens_is_refused(material, tmp_path, number):
    with pytest.raises(UserError, match=r"--distributions .* is neither a number nor 'all'"):
        cache_config(material, tmp_path / "ref.zarr", distributions=number)


@pytest.mark.parametrize(("number", "head"), [("0", "liger"), ("8", "chunked"), ("all", "chunked")])
def test_the_head_that_is_printed(material, tmp_path, monkeypatch, capsys, number, head):
    """Where Liger's would serve: it gives log-probabilities only, no distributions."""
    monkeypatch.setattr(language_model, "choose_head", lambda network: "liger")
    cache(cache_config(material, tmp_path / "ref.zarr", distributions=number))
    assert f", head {head};" in capsys.readouterr().err


def test_more_tokens_than_there_are_are_refused(material, tmp_path, monkeypatch):
    """Before the model is read."""
    monkeypatch.setattr(caching_stage, "load_saes", None)
    with pytest.raises(UserError, match=f"the vocabulary of .* has {V} tokens") as error:
        cache(cache_config(material, tmp_path / "ref.zarr", distributions=str(V)))
    assert "--distributions all" in error.value.hint
