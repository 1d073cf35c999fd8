"""Writes HTML pages of the control experiment and takes the pictures docs/images/*.png.

    make screenshots

It begins with `make control`, which takes half an hour on two cores if it was not run before, and
needs the browser of `make browser-check`.
"""

import shlex
import shutil
import subprocess
import sys
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from fpocli import CacheConfig, preview
from fpocli.display.terminal import show_preview

CONTROL, WORK = Path("demo/control"), Path("demo/pages")
RUNS = CONTROL / "compare/runs"
IMAGES = Path("docs/images")
# By name of the picture: page, heading it begins at or None for the top, scheme, width.
PICTURES: dict[str, Any] = {
    "store-light": ("store", None, "light", 1280),
    "store-contrast": ("store", "contrast", "light", 1280),
    "store-tokens": ("store", "examples", "dark", 1280),
    "runs-dark": ("runs", "curves", "dark", 1280),
    "runs-samples": ("runs", "samples", "light", 1280),
    "runs-narrow": ("runs", None, "light", 390),
    "terminal": ("terminal", None, "dark", 1000),
}


def main() -> None:
    """Both pages, and the pictures of them."""
    WORK.mkdir(parents=True, exist_ok=True)
    (store,) = (CONTROL / "compare/stores").glob("*.zarr")
    (site,) = yaml.safe_load((CONTROL / "found.yaml").read_text(encoding="utf-8")).values()
    feature = site["groups"]["french"]["features"][0]
    fpo(f"inspect {store} --html {WORK / 'store.html'} --feature {feature}")
    seeds = " ".join(str(run) for run in sorted(RUNS.glob("*_seed-0")))
    fpo(f"report {RUNS / 'method-reference'} {seeds} --html {WORK / 'runs.html'}")
    write_terminal()
    take_pictures()


def write_terminal() -> None:
    """What `fpo cache --dry-run` prints, as a page."""
    shown = preview(
        CacheConfig(model="demo/SmolLM2-135M-Instruct", data=["examples/preferences.jsonl"])
    )
    console = Console(record=True, width=100, force_terminal=True, file=StringIO())
    show_preview(shown, console)
    console.save_html(str(WORK / "terminal.html"), theme=MONOKAI)


def take_pictures() -> None:
    """Every picture of PICTURES, 1,100 pixels high."""
    IMAGES.mkdir(exist_ok=True)
    program = shutil.which("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for name, (page, heading, scheme, width) in PICTURES.items():
            tab = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 1100})
            part = f"#{heading}" if heading else ""
            tab.goto((WORK / f"{page}.html").resolve().as_uri() + part)
            picture = Image.open(BytesIO(tab.screenshot()))
            # Few colours are in use, so a palette of 256 makes the file a third as large.
            picture.quantize(256).save(IMAGES / f"{name}.png", optimize=True)
        browser.close()


def fpo(command: str) -> None:
    """Run a command of fpo as a user would."""
    print(f"$ fpo {command}", flush=True)
    subprocess.run([sys.executable, "-m", "fpocli", *shlex.split(command)], check=True)


if __name__ == "__main__":
    main()
