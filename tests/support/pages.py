"""HTML pages made from tiny models, from ordinary data and from data that try to break a page; and
what a page holds, by Python's own HTML parser."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import tiny
from stores import cache_config

from fpocli import EvalConfig, cache, evaluate

# A file's name cannot hold a slash.
NAME = "<img src=x onerror=alert(1)>\"'&amp;`"
HOSTILE = [
    "<script>alert(1)</script>",
    "</style></script></textarea></title><svg onload=alert(2)>",
    '" onmouseover="alert(3)" x=\'y',
    "]]> --> {{ 7 * 7 }} {% raw %} &amp; &lt; &#39;",
    "[here](javascript:alert(4)) javascript:alert(5) <a href=javascript:alert(6)>x</a>",
    "\u202eright to left\u202c مرحبا שלום",
    "😀 👩‍👩‍👧 e\u0301 $x_1$ \\frac{1}{2} 中文",
    "<base href=https://example.com/><meta http-equiv=refresh content=0;url=https://example.com>",
    "long" * 40,
    "<!-- <style>* { display: none }</style>\n\n  two spaces,\ttab",
]
VOID = {"meta", "link", "br", "img", "input", "base", "hr"}


def hostile_material(folder: Path) -> Path:
    """A store and a run, and evaluations with samples of both models, all with hostile names and
    texts.

    Args:
        folder: empty; the store is ref.zarr in it, the run is NAME and the evaluation of the
            reference is `reference`.
    """
    tiny.model_folder(folder / NAME)
    tiny.sae_folder(folder / f"sae {NAME}")
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        for prompt, chosen, rejected in zip(
            HOSTILE, HOSTILE[1:] + HOSTILE[:1], HOSTILE[2:] + HOSTILE[:2], strict=True
        )
    ]
    unusable = [{"prompt": "x", "chosen": "y", HOSTILE[0]: 3}, {HOSTILE[2]: HOSTILE[1]}]
    data = folder / f"{NAME}.jsonl"
    lines = [json.dumps(row) for row in (*rows, *rows, *unusable)]
    data.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    cache(
        cache_config(
            folder,
            folder / "ref.zarr",
            model=str(folder / NAME),
            sae=[str(folder / f"sae {NAME}")],
            data=str(data),
            distributions="8",
        )
    )
    return folder


def evaluated(store: Path, model: Path, out: Path, prompts: list[str]) -> Path:
    """An evaluation of a model with samples."""
    file = store.with_name("prompts.jsonl")
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    evaluate(
        EvalConfig(
            model=str(model),
            cache=str(store),
            reference=str(store.with_name(NAME)),
            eval_fraction=0.2,
            generate=[str(file)],
            max_new_tokens=8,
            device="cpu",
            out=str(out),
        )
    )
    return out


def numbers(value: object) -> set[float]:
    """All numbers in plain values."""
    if isinstance(value, dict):
        return set().union(*map(numbers, value.values()))
    if isinstance(value, (list, tuple)):
        return set().union(*map(numbers, value))
    return {float(value)} if isinstance(value, (int, float)) else set()


class Page(HTMLParser):
    """What a page holds.

    `tags` are elements with their attributes, `data` pairs of exact value and text of its numbers,
    `texts` the texts of the data, `tables` rows of cells by the heading that comes before, and
    `loose` the text of cells for numbers that is not in a number's element.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[tuple[str, str]] = []
        self.texts: list[str] = []
        self.loose = ""
        self.words = ""
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[tuple[str, str]] = []
        self._heading = ""
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attributes):
        about = dict(attributes)
        self.tags.append((tag, about))
        if tag in VOID:
            return
        self._open.append((tag, about.get("class") or ""))
        if tag == "data":
            self.data.append((about["value"], ""))
        if about.get("class") == "text":
            self.texts.append("")
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag, tag

    def handle_data(self, text):
        inside = [tag for tag, _ in self._open]
        if not {"style", "title"} & set(inside):
            self.words += text
        if inside[-1:] == ["data"]:
            value, before = self.data.pop()
            self.data.append((value, before + text))
        elif any(tag == "td" and "number" in kind.split() for tag, kind in self._open):
            self.loose += text
        if any(kind == "text" for _, kind in self._open):
            self.texts[-1] += text
        if "h2" in inside:
            self._heading += text
        if {"td", "th"} & set(inside):
            self.tables[self._heading][-1][-1] += text


def shown_number(text: str) -> tuple[float, float]:
    """The number that a text such as 1,234.5 or 38.1% shows, and half a unit of its last digit."""
    digits = text.replace(",", "").rstrip("%")
    mantissa, _, exponent = digits.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    scale = 10.0 ** int(exponent or 0) / (100 if text.endswith("%") else 1)
    return float(mantissa) * scale, 0.5001 * 10.0**-decimals * scale


def rgb(colour: str) -> tuple[float, ...]:
    """Red, green and blue of #rrggbb."""
    return tuple(int(part, 16) for part in re.findall("..", colour[1:]))


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2's contrast of two colours, red, green and blue from 0 to 255."""

    def luminance(colour: tuple[float, ...]) -> float:
        parts = [part / 255 for part in colour[:3]]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
