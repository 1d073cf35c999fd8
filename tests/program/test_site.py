"""The documentation site, as somebody reads it from a disk: `make docs browser-check`."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.browser
SITE = Path(__file__).parents[2] / "site"


@pytest.fixture
def opened(chromium):
    """Opens a page of the site and fails on every message, and every request to another place."""
    assert (SITE / "index.html").is_file(), "make docs builds the site"
    complaints: list[str] = []
    contexts = []

    def opened(page: str, scheme: str = "light", width: int = 1280):
        context = chromium.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 844}
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: complaints.append(f"{tab.url}: {message.text}"))
        tab.on("pageerror", lambda error: complaints.append(f"{tab.url}: {error}"))
        tab.on(
            "request",
            lambda request: (
                request.url.startswith((SITE.as_uri(), "about:", "data:"))
                or complaints.append(f"{tab.url} asks for {request.url}")
            ),
        )
        tab.goto((SITE / page).as_uri())
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert not complaints


@pytest.mark.parametrize("scheme, width", [("light", 1280), ("dark", 390)])
def test_every_page_is_whole(opened, scheme, width):
    """Nothing sticks out, every picture is there, and the colours are those that were asked for."""
    pages = sorted(page.relative_to(SITE) for page in SITE.rglob("*.html"))
    assert len(pages) > 30
    tab = opened("index.html", scheme, width)
    for page in pages:
        if page.name == "404.html":
            # Its addresses are those of a server.
            continue
        tab.goto((SITE / page).as_uri())
        inside, outside = tab.evaluate("[document.scrollingElement.scrollWidth, innerWidth]")
        assert inside <= outside == width, page
        pictures = tab.eval_on_selector_all(
            "article img", "all => all.map(one => [one.src, one.naturalWidth])"
        )
        assert all(size for _, size in pictures), (page, pictures)
        colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(int(part) for part in colour[4:-1].split(",")[:3]) > 3 * 128
        assert light == (scheme == "light"), (page, colour)


def test_the_search_works_from_a_disk(opened):
    tab = opened("index.html")
    box = tab.locator("input.md-search__input")
    # The first click loads the index; what is typed before it is there may not be searched for.
    box.click()
    tab.wait_for_function(
        "document.querySelector('.md-search-result__meta').textContent.includes('Type to start')"
    )
    box.press_sequentially("stop-gradient")
    result = tab.locator("a.md-search-result__link[href*='method.html']").first
    result.wait_for()
    result.click()
    tab.wait_for_url("**/method.html**")
    assert "stop-gradient" in tab.inner_text("article")


def test_flags_and_functions_are_in_the_reference(opened):
    assert "--feature-weights" in opened("reference/cli.html").inner_text("article")
    text = opened("reference/api.html").inner_text("article")
    assert "evaluate(" in text and "check_reference" in text and "deduplicate" in text
