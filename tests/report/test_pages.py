"""The HTML pages: their numbers are those of --json, and text of the data is only ever text."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from pages import HOSTILE, NAME, Page, contrast, numbers, rgb, shown_number
from stores import contents

import fpocli
from fpocli import InspectConfig, UserError
from fpocli.report.describe import describe

SITE = "layer_3.resid_post"
NAMES = ["store", "feature", "hostile", "hostile-feature", "runs"]
ELEMENTS = set(
    re.findall(
        r"\w+",
        "html head meta title style body div header nav ul li a main footer h1 h2 h3 h4 p span "
        "strong code bdi data figure figcaption details summary table thead tbody tr th td "
        "svg g path defs use text clippath rect",
    )
)
TEMPLATES = Path(fpocli.__file__).parent / "display/templates"


@pytest.mark.parametrize("name", NAMES)
def test_every_number_is_one_of_the_jsons(pages, name):
    file, shown = pages[name]
    page, known = Page(file.read_text()), numbers(shown)
    assert len(page.data) > 50
    for value, text in page.data:
        assert float(value) in known, (value, text)
        number, half = shown_number(text)
        assert number == pytest.approx(float(value), abs=half), (value, text)
    for _, about in page.tags:
        if "data-value" in about:
            assert float(about["data-value"]) in known
    assert not re.search(r"\d", page.loose), page.loose


@pytest.mark.parametrize("name", NAMES)
def test_pages_are_one_file_without_scripts(pages, name):
    page = Page(pages[name][0].read_text())
    assert {tag for tag, _ in page.tags} <= ELEMENTS
    assert not [about for tag, about in page.tags if any(key.startswith("on") for key in about)]
    addresses = [about[key] for _, about in page.tags for key in ("href", "src") if key in about]
    assert all(re.fullmatch(r"#[\w-]+", address) for address in addresses), addresses
    policy = [about["content"] for tag, about in page.tags if "http-equiv" in about]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'; img-src data:"]
    ids = [about["id"] for _, about in page.tags if "id" in about]
    assert len(ids) == len(set(ids))
    assert {address[1:] for address in addresses} <= set(ids)
    clips = [about["clip-path"] for _, about in page.tags if "clip-path" in about]
    assert clips and {clip[5:-1] for clip in clips} <= set(ids)
    drawn = [about for tag, about in page.tags if tag == "svg"]
    assert all(about["role"] == "img" and about["aria-label"] for about in drawn)
    assert len({about["aria-label"] for about in drawn}) == len(drawn)


def test_text_of_the_data_is_shown_as_it_is(pages):
    for name in ("hostile", "hostile-feature", "runs"):
        file, shown = pages[name]
        page = Page(file.read_text())
        if name == "runs":
            (group,) = shown["samples"]
            expected = [row["prompt"][0] for row in group["rows"]]
            assert expected == HOSTILE
            for row in group["rows"]:
                assert all(len(answer) == 1 for answer in row["answers"])
                expected += [answer[0] for answer in row["answers"]]
            assert NAME in page.words
        else:
            expected = [text for pair in shown["examples"] for text in pair["text"].values()]
            assert all(any(one in text for one in HOSTILE) for text in expected)
            assert f"{NAME}.jsonl, line 21" in page.words
        assert sorted(page.texts) == sorted(expected)


def test_tables_have_each_number_in_its_place(pages):
    file, shown = pages["store"]
    tables = Page(file.read_text()).tables
    heads, *rows = tables["Lengths"]
    assert [row[0] for row in rows] == ["chosen", "rejected", "prompt"]
    for part, *cells in rows:
        for head, cell in zip(heads[1:], cells, strict=True):
            assert shown_number(cell)[0] == pytest.approx(shown["lengths"][part][head], abs=0.05)
    file, shown = pages["runs"]
    tables = Page(file.read_text()).tables
    _, _, *rows = tables["Held-out pairs, before and after"]
    assert {row[0] for row in rows} == set(shown["held_out"])
    for name, *cells in rows:
        expected = [
            None if found is None else found[when]
            for found in shown["held_out"][name]
            for when in ("before", "after")
        ]
        for cell, value in zip(cells, expected, strict=True):
            assert cell == ("–" if value is None else f"{value:.4g}")
    accuracies = [row for row in tables["Evaluation"] if row[0].startswith("accuracy, implicit")]
    for cell, run in zip(accuracies[0][1:], shown["runs"], strict=True):
        found = run["evaluation"]["reward_accuracy"]
        assert cell == f"{found['share']:.4f} ± {found['standard_error']:.2g}"


def test_the_json_of_a_page_has_what_inspect_prints(pages, store_path):
    plain = describe(fpocli.Store.open(store_path))
    shown = pages["store"][1]
    assert {name: shown[name] for name in plain} == json.loads(json.dumps(plain))


def test_the_same_store_gives_the_same_bytes(pages, store_path, tmp_path):
    again = tmp_path / "again.html"
    fpocli.inspect(InspectConfig(store=str(store_path), html=str(again)))
    assert again.read_bytes() == pages["store"][0].read_bytes()


def test_colours_can_be_told_from_the_background():
    """Text at least 4.5, lines of charts at least 3, as in WCAG 2."""
    text = (TEMPLATES / "page.css").read_text()
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#\w{6});", block))
        for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL)
    )
    assert light.keys() == dark.keys()
    for scheme in (light, dark):
        colours = {name: rgb(value) for name, value in scheme.items()}
        for behind in ("--background", "--panel"):
            for name in ("--text", "--muted", "--link"):
                assert contrast(colours[name], colours[behind]) >= 4.5, name
        assert contrast(colours["--text"], colours["--shade"]) >= 4.5
        for name in (name for name in colours if name.startswith("--series")):
            assert contrast(colours[name], colours["--background"]) >= 3, name


def test_no_colour_of_a_chart_is_left_as_matplotlib_drew_it(pages):
    for file, _ in pages.values():
        styles = [about["style"] for _, about in Page(file.read_text()).tags if "style" in about]
        assert styles and not [style for style in styles if re.search("#[0-9a-fA-F]{3}", style)]


def test_settings_that_make_no_page_are_refused(store_path, tmp_path):
    config = InspectConfig(store=str(store_path))
    with pytest.raises(UserError, match="--feature is part of the page"):
        replace(config, feature=3)
    page = str(tmp_path / "page.html")
    with pytest.raises(UserError, match="--pair and --html"):
        replace(config, html=page, pair=3)
    with pytest.raises(UserError, match="has no feature 96"):
        fpocli.inspect(replace(config, html=page, feature=96))
    # A third of the tiny SAE's features never fires.
    with pytest.raises(UserError, match="feature 3 is not among the stored features"):
        fpocli.inspect(replace(config, html=page, feature=3))


def test_tokens_are_shaded_by_plain_transformers_and_sae_lens(pages, store_path):
    """Each sequence alone: the state of the last layer at a token, encoded by sae-lens."""
    shown, arrays = pages["feature"][1], contents(store_path)
    network, sae = tiny.network("gemma2"), tiny.sae()
    features = arrays[f"features/{SITE}/index"], arrays[f"features/{SITE}/value"]
    pooled = np.where(features[0] == 4, features[1], 0).max((1, 2))
    expected_pairs = np.argsort(-pooled, kind="stable")[:5].tolist()
    assert [pair["pair"] for pair in shown["examples"]] == expected_pairs
    highest = []
    for pair in shown["examples"]:
        start, chosen, rejected, end = arrays["spans"][pair["pair"]].tolist()
        tokens = torch.tensor(arrays["tokens"].astype(np.int64))
        for name, first, last in (("chosen", chosen, rejected), ("rejected", rejected, end)):
            states = []
            hook = network.model.norm.register_forward_pre_hook(
                lambda module, inputs, states=states: states.append(inputs[0])
            )
            with torch.no_grad():
                network(torch.cat([tokens[start:chosen], tokens[first:last]])[None])
            hook.remove()
            values = sae.encode(states[0][0, chosen - start - 1 : -1])[:, 4].tolist()
            pieces = pair["pieces"]
            assert "".join(piece["text"] for piece in pieces[name]) == pair["text"][name]
            assert pieces["prompt"][-1]["value"] == pytest.approx(values[0], abs=1e-4)
            assert not any(piece["value"] for piece in pieces["prompt"][:-1])
            # The pairs have no character of several tokens, and no end of a response is scored.
            seen = [piece["value"] for piece in pieces[name]]
            assert seen == pytest.approx([*values[1:], 0], abs=1e-4)
            highest += values
    assert shown["feature"]["largest"] == pytest.approx(max(highest), abs=1e-4)


def test_the_pieces_of_a_character_are_shown_together(pages):
    shown = pages["hostile-feature"][1]
    parts = [part for pair in shown["examples"] for part in pair["pieces"].items()]
    assert any(ord(piece["text"][0]) > 0xFFFF for _, part in parts for piece in part)
    for pair in shown["examples"]:
        for name, part in pair["pieces"].items():
            assert "".join(piece["text"] for piece in part) == pair["text"][name]
            assert not any("\ufffd" in piece["text"] for piece in part)
