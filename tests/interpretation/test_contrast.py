"""fpo features contrast on a store."""

import json
import random

import numpy as np
import pytest
import statsmodels.api as sm
import tiny
import torch
from stores import cache_config, contents, set_attributes, write_pairs
from typer.testing import CliRunner

from fpocli import ContrastConfig, UserError, cache, contrast
from fpocli.cli.commands import app
from fpocli.interpretation.paired_test import sign_flip_p
from fpocli.interpretation.style import STYLE, measure_style
from fpocli.scoring.loading import find_tokenizer
from fpocli.store.reader import Store

SITE = f"layer_{tiny.LAYERS - 1}.resid_post"


def run(path, **changes):
    return contrast(ContrastConfig(store=str(path), json=True, **({"top": 96} | changes)))


@pytest.fixture(scope="module")
def small(material):
    """A store of the same pairs with 4 values per response, in other blocks."""
    path = material / "small.zarr"
    cache(cache_config(material, path, top_k="4", block=5))
    return path


@pytest.fixture(scope="module")
def styled(material):
    """A store of 40 pairs whose responses differ in every style measure but exclamation marks, of
    which the rejected have one each."""
    rng = random.Random(0)
    marks = ["# the\n", "**cat** ", "- hat\n", "```\nx = y\n```\n", "HAT ", "the rat "]

    def text():
        return "".join(rng.choices(marks, k=rng.randint(1, 12)))

    rows = [{"prompt": "say", "chosen": text(), "rejected": text() + "!"} for _ in range(40)]
    data = material / "styled.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = material / "styled.zarr"
    cache(cache_config(material, path, data=str(data), top_k="20"))
    return path


def dense(path):
    """The stored values [2, N, m], by a loop over plain Zarr arrays."""
    arrays = contents(path)
    index, value = (arrays[f"features/{SITE}/{name}"] for name in ("index", "value"))
    values = np.zeros((2, len(index), tiny.FEATURES))
    for pair, side, slot in np.ndindex(index.shape):
        if value[pair, side, slot] > 0:
            values[side, pair, index[pair, side, slot]] = value[pair, side, slot]
    return values


def styles(path, folder):
    """Style differences of all pairs, from the ids in plain Zarr arrays."""
    arrays = contents(path)
    tokenizer = find_tokenizer(Store.open(path), str(folder))
    rows = []
    for _, start, middle, end in arrays["spans"]:
        sides = arrays["tokens"][start:middle], arrays["tokens"][middle:end]
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in sides]
        one, other = (measure_style(t, len(i)) for t, i in zip(texts, sides, strict=True))
        rows.append(np.subtract(one, other))
    return np.array(rows, float)


@pytest.mark.parametrize("which", ["small", "styled"])
def test_numbers_are_those_of_a_loop(which, material, request, capsys):
    path = request.getfixturevalue(which)
    shown = run(path)
    chosen, rejected = dense(path)
    d, style = chosen - rejected, styles(path, material / "model")
    frequency = contents(path)[f"features/{SITE}/frequency"] / len(d)
    tested = np.flatnonzero((d != 0).any(0))
    assert (shown["pairs"], shown["tested"]) == (len(d), len(tested))
    assert sorted(row["feature"] for row in shown["features"]) == tested.tolist()
    varies = style.std(0) > 0
    if which == "styled":
        assert [name for name, used in zip(STYLE, varies, strict=True) if not used] == [
            "exclamation marks"
        ]
    designs = {
        "length": sm.add_constant(style[:, :1]),
        "style": sm.add_constant(style[:, varies]),
    }
    for row in shown["features"]:
        f = row["feature"]
        ours = [row["mean"]["chosen"], row["mean"]["rejected"], row["difference"], row["effect"]]
        expected = [chosen[:, f].mean(), rejected[:, f].mean(), d[:, f].mean()]
        expected.append(d[:, f].mean() / d[:, f].std(ddof=1))
        np.testing.assert_allclose(ours, expected, rtol=1e-9, atol=1e-12)
        assert [row["frequency"][side] for side in ("chosen", "rejected")] == [*frequency[:, f]]
        assert row["p"] == pytest.approx(sign_flip_p(d[:, f].sum(), (d[:, f] ** 2).sum()))
        assert row["label"] is row["page"] is None
        for name, design in designs.items():
            fit = sm.OLS(d[:, f], design).fit(cov_type="HC1", use_t=True)
            left = row[f"at_equal_{name}"]
            assert left["difference"] == pytest.approx(fit.params[0], rel=1e-6, abs=1e-9)
            np.testing.assert_allclose(left["interval"], fit.conf_int()[0], rtol=1e-5, atol=1e-8)
            assert left["explained"] == pytest.approx(1 - fit.params[0] / d[:, f].mean(), rel=1e-5)
    for i, row in enumerate(shown["style"]):
        assert row["name"] == STYLE[i]
        assert row["difference"] == pytest.approx(style[:, i].mean())
        assert row["mean"]["chosen"] - row["mean"]["rejected"] == pytest.approx(row["difference"])


def test_what_is_not_stored_is_bounded(store_path, small, capsys):
    """The store of 64 values has all that are > 0; of the other, differences are within bounds."""
    every, few = run(store_path), run(small)
    assert every["stored_share"] == pytest.approx(1)
    assert 0.1 < few["stored_share"] < 0.9
    exact = {row["feature"]: row for row in every["features"]}
    assert all(row["missing"] < 1e-6 for row in exact.values())
    moved = 0
    for row in few["features"]:
        gap = abs(row["difference"] - exact[row["feature"]]["difference"])
        assert gap <= row["missing"] + 1e-6
        moved += gap > 1e-3
        assert row["frequency"] == exact[row["feature"]]["frequency"]
    assert moved > 3


def test_blocks_change_nothing(material, store_path, tmp_path, capsys):
    other = cache(cache_config(material, tmp_path / "ref.zarr", block=21))
    one, two = run(store_path), run(other.path)
    for row, same in zip(one["features"], two["features"], strict=True):
        assert row["feature"] == same["feature"]
        for name in ("difference", "effect", "p", "q"):
            # Float32 products of other numbers of rows may differ in the last bit.
            assert row[name] == pytest.approx(same[name], rel=1e-5)


def test_order_and_findings(store_path, capsys):
    shown = run(store_path, rate=0.9, top=5)
    rows = run(store_path)["features"]
    keys = [(row["q"], -abs(row["effect"])) for row in rows]
    assert keys == sorted(keys)
    assert shown["features"] == rows[:5]
    assert shown["found"] == sum(row["q"] <= 0.9 for row in rows)
    assert run(store_path, rate=0)["found"] == 0


def test_pairs_without_values_are_left_out(material, tmp_path, capsys):
    """A model that returns NaN for texts with a 3, and two data sets: with such pairs, without."""
    network = tiny.network("llama")
    with torch.no_grad():
        network.model.embed_tokens.weight[tiny.tokenizer().encode("3")[0]] = torch.nan
    network.save_pretrained(tmp_path / "nan")
    tiny.tokenizer().save_pretrained(tmp_path / "nan")
    lines = write_pairs(tmp_path / "pairs.jsonl", 21).read_text().splitlines()
    shown = []
    kept = [line for row, line in enumerate(lines) if row not in (0, 9)]
    for row in (0, 9):
        lines[row] = lines[row].replace('"prompt": "', '"prompt": "3')
    for name, rows in (("all", lines), ("kept", kept)):
        data = tmp_path / f"{name}.jsonl"
        data.write_text("\n".join(rows))
        changes = {"model": str(tmp_path / "nan"), "data": str(data), "drop_non_finite": True}
        path = cache(cache_config(material, tmp_path / f"{name}.zarr", **changes)).path
        shown.append(run(path))
    assert Store.open(tmp_path / "all.zarr").non_finite == [0, 9]
    one, two = shown
    assert one["pairs"] == two["pairs"] == 19
    assert one["style"] == two["style"]
    for row, same in zip(one["features"], two["features"], strict=True):
        assert row["feature"] == same["feature"]
        for name in ("difference", "effect", "p", "q", "missing"):
            assert row[name] == pytest.approx(same[name], rel=1e-4, abs=1e-5)


def test_command_line(store_path, tmp_path):
    labels = tmp_path / "labels.jsonl"
    entries = [{"index": str(f), "description": f"kind {f}"} for f in range(96)]
    labels.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    words = ["features", "contrast", str(store_path), "--labels", str(labels), "--top", "3"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    shown = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert shown == contrast(
        ContrastConfig(store=str(store_path), labels=str(labels), top=3, json=True)
    )
    assert len(shown["features"]) == 3
    for row in shown["features"]:
        assert row["label"] == f"kind {row['feature']}"
        lines = [line.split() for line in done.stdout.splitlines()]
        numbers, label = (line for line in lines if line[:1] == [str(row["feature"])])
        assert label[1:] == ["kind", str(row["feature"])]
        assert f"{row['difference']:+.3g}" in numbers and f"{row['q']:.2g}" in numbers


def test_a_store_that_names_its_saes_page(store_path, material, tmp_path, capsys):
    path = cache(cache_config(material, tmp_path / "ref.zarr")).path
    set_attributes(path, neuronpedia={SITE: "tiny/3-res"})
    shown = contrast(ContrastConfig(store=str(path)))
    row = shown["features"][0]
    assert row["page"] == f"https://www.neuronpedia.org/tiny/3-res/{row['feature']}"
    assert row["page"] in capsys.readouterr().out


def refusal(path, **changes):
    with pytest.raises(UserError) as caught:
        run(path, **changes)
    return caught.value


def test_refusals(store_path, material, tmp_path):
    assert "has no features at layer_0" in refusal(store_path, at="layer_0.resid_post").message
    bare = cache(cache_config(material, tmp_path / "bare.zarr", layer=[], sae=[], limit=2))
    assert refusal(bare.path).message.endswith("has no features")
    sae = str(material / "sae")
    two = cache(cache_config(material, tmp_path / "two.zarr", layer=[1, 2], sae=[sae, sae]))
    assert "name one with --at: layer_1.resid_post" in refusal(two.path).hint
    assert run(two.path, at="layer_2.resid_post")["site"] == "layer_2.resid_post"
    few = cache(cache_config(material, tmp_path / "few.zarr", limit=9))
    assert "9 pairs, which is too few" in refusal(few.path).message
    set_attributes(few.path, state="partial")
    assert "is partial" in refusal(few.path).message


def test_the_tokeniser_is_found_where_it_is_now(material, tmp_path, capsys):
    model = tiny.model_folder(tmp_path / "model")
    path = cache(cache_config(material, tmp_path / "ref.zarr", model=str(model))).path
    model.rename(tmp_path / "moved")
    missing = refusal(path)
    assert "is not found" in missing.message and "--model" in missing.hint
    assert run(path, model=str(tmp_path / "moved"))["pairs"] == 21
