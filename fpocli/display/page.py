"""The frame of the HTML pages: one file each, without scripts, that asks for nothing.

Jinja escapes all that a template shows, so text of the data is only ever text. The templates are in
templates/: base.html is the frame, parts.html has tables, charts and tokens, store.html and
runs.html are the pages.
"""

from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from fpocli.system.files import replace_text

# Neuronpedia's pages of features are the only links to elsewhere.
_LINKS = "https://www.neuronpedia.org/"


def write_page(file: Path, template: str, **content: Any) -> None:
    """Fill in a template and write the page.

    Args:
        file: HTML.
        template: a file of templates/.
        content: what the template names; charts are Markup, made by page_charts.py.
    """
    page = _templates().get_template(template).render(content, version=version("fpocli"))
    # Half a surrogate pair, which JSON can spell, is no text.
    page = page.encode("utf-8", "replace").decode()
    replace_text(file, page)


@lru_cache
def _templates() -> Environment:
    made = Environment(
        loader=PackageLoader("fpocli.display"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"number": number, "link": link}
    return made


def number(value: float | None, form: str = ",") -> Markup:
    """A number as text, with its exact value in the element.

    Args:
        value: the number; None is shown as a dash.
        form: of the text, as in an f-string.
    """
    if value is None:
        return Markup("–")
    return Markup('<data value="{}">{}</data>').format(repr(value), f"{value:{form}}")


def link(text: str | int, address: str | None) -> Markup:
    """Text, as a link if the address is one of a feature's page at Neuronpedia."""
    if address is None or not address.startswith(_LINKS):
        return escape(text)
    return Markup('<a href="{}" rel="noreferrer">{}</a>').format(address, text)
