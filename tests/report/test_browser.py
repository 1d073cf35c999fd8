"""The HTML pages in a real browser: `make browser-check`."""

import re
from pathlib import Path

import pytest
from pages import HOSTILE, NAME, contrast, numbers, shown_number

pytestmark = pytest.mark.browser
NAMES = ["store", "feature", "hostile", "hostile-feature", "runs"]
WIDTHS = (1280, 390)
# Colour of the text, and of what is behind it: the backgrounds up to the first opaque one.
COLOURS = """() => {
  const opaque = colour => /^rgb\\(/.test(colour);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), parent = walker.currentNode.parentElement;
    if (!text || !parent.checkVisibility()) continue;
    const svg = parent.closest("svg") !== null;
    const style = getComputedStyle(parent);
    const behind = [];
    for (let at = parent; at; at = at.parentElement) {
      behind.push(getComputedStyle(at).backgroundColor);
      if (opaque(behind.at(-1))) break;
    }
    found.push({text, colour: svg ? style.fill : style.color, behind});
  }
  return found;
}"""


@pytest.fixture
def opened(chromium, pages):
    """Opens a page and fails on every message, dialog and request but that for the page."""
    complaints: list[str] = []
    contexts = []

    def opened(name: str, scheme: str = "light", width: int = 1280):
        address = pages[name][0].as_uri()
        context = chromium.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 844}
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        tab.on(
            "request",
            lambda request: request.url == address or complaints.append(request.url),
        )
        tab.goto(address)
        # All of it is laid out.
        tab.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_and_nothing_sticks_out(opened, name):
    for width in WIDTHS:
        tab = opened(name, width=width)
        tab.wait_for_timeout(50)
        inside, outside = tab.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert inside <= outside
        assert outside == width


@pytest.mark.parametrize("name", ["hostile", "hostile-feature", "runs"])
def test_a_reader_sees_the_text_of_the_data(opened, pages, name):
    tab, shown = opened(name), pages[name][1]
    seen = tab.eval_on_selector_all(".text", "all => all.map(one => one.innerText)")
    if name == "runs":
        rows = shown["samples"][0]["rows"]
        expected = [row["prompt"][0] for row in rows]
        assert expected == HOSTILE
        expected += [answer[0] for row in rows for answer in row["answers"]]
        assert NAME in tab.inner_text("body")
    else:
        expected = [text for pair in shown["examples"] for text in pair["text"].values()]
    # A carriage return ends a line, as everywhere.
    assert sorted(seen) == sorted(re.sub("\r\n?", "\n", text) for text in expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_reader_sees_the_numbers_of_the_json(opened, pages, name):
    seen = opened(name).eval_on_selector_all(
        "data", "all => all.map(one => [one.value, one.innerText])"
    )
    known = numbers(pages[name][1])
    assert len(seen) > 50
    for value, text in seen:
        number, half = shown_number(text)
        assert float(value) in known
        assert number == pytest.approx(float(value), abs=half)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_text_can_be_told_from_what_is_behind_it(opened, name, scheme):
    """WCAG 2 asks for 4.5."""
    texts = opened(name, scheme).evaluate(COLOURS)
    assert len(texts) > 100
    for found in texts:
        behind = blend([parse(colour) for colour in found["behind"]])
        assert contrast(parse(found["colour"]), behind) >= 4.5, found
    if name == "feature":
        assert any(len(found["behind"]) > 2 and "color(" in found["behind"][0] for found in texts)


def parse(colour: str) -> tuple[float, ...]:
    """Red, green and blue from 0 to 255, and opacity, of a computed colour."""
    values = [float(value) for value in re.findall(r"[\d.]+(?:e-?\d+)?", colour)]
    if colour.startswith("color(srgb"):
        values = [255 * value for value in values[:3]] + values[3:]
    assert colour.startswith(("rgb", "color(srgb")) and len(values) in (3, 4), colour
    return (*values, 1.0) if len(values) == 3 else tuple(values)


def blend(colours: list[tuple[float, ...]]) -> tuple[float, ...]:
    """The colour of layers, the topmost first and the last opaque."""
    *above, (red, green, blue, opacity) = colours
    assert opacity == 1
    seen: tuple[float, ...] = (red, green, blue)
    for *layer, opacity in reversed(above):
        seen = tuple(opacity * a + (1 - opacity) * b for a, b in zip(layer, seen, strict=True))
    return seen


def test_pages_can_be_printed(opened, tmp_path):
    file: Path = tmp_path / "page.pdf"
    opened("runs").pdf(path=file)
    assert file.read_bytes().startswith(b"%PDF")
