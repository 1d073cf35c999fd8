"""Runs SmolLM2 in the two ways the pages show, writes both pages and takes docs/images/*.png.

    make screenshots

Takes about fifteen minutes on two cores, and needs the browser of `make browser-check`.
"""

import shlex
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from fpocli import ContrastConfig, contrast

WORK = Path("demo/pages")
MODEL, SAE = Path("demo/SmolLM2-135M-Instruct"), Path("demo/sae")
# Many pairs to look at, few to train on.
STORE, SMALL = WORK / "ref.zarr", WORK / "small.zarr"
IMAGES = Path("docs/images")
PAIRS, PROMPTS = "examples/preferences.jsonl", "examples/prompts.jsonl"
SAMPLES = f"--generate {PROMPTS} --prompts 3 --max-new-tokens 40 --temperature 0"
# By name of the picture: page, heading it begins at or None for the top, scheme, width.
PICTURES: dict[str, Any] = {
    "store-light": ("store", None, "light", 1280),
    "store-contrast": ("store", "contrast", "light", 1280),
    "store-tokens": ("store", "examples", "dark", 1280),
    "runs-dark": ("runs", "curves", "dark", 1280),
    "runs-samples": ("runs", "samples", "light", 1280),
    "runs-narrow": ("runs", None, "light", 390),
}


def main() -> None:
    """Make what is missing, then both pages and the pictures."""
    WORK.mkdir(parents=True, exist_ok=True)
    for store, limit in ((STORE, 160), (SMALL, 32)):
        data = f"--data {PAIRS} --limit {limit} --out {store}"
        fpo(f"cache --model {MODEL} --layer 24 --sae {SAE} {data}")
    runs = {"fpo": "--method fpo", "dpo_norm": "--method dpo_norm"}
    for name, method in runs.items():
        fpo(
            f"train --cache {SMALL} {method} --lr 2e-5 --warmup 2 --batch-size 2 --eval-every 4 "
            f"--measure-kl --no-activation-checkpointing --eval-fraction 0.25 --out {WORK / name}"
        )
    for name in runs:
        fpo(f"eval {WORK / name} --cache {SMALL} --reference {MODEL} {SAMPLES}")
    before = f"--eval-fraction 0.25 --reference {MODEL} {SAMPLES} --out {WORK / 'reference'}"
    fpo(f"eval {MODEL} --cache {SMALL} {before}")
    fpo(f"inspect {STORE} --html {WORK / 'store.html'} --feature {separating_feature()}")
    folders = " ".join(str(WORK / name) for name in ("reference", *runs))
    fpo(f"report {folders} --html {WORK / 'runs.html'}")
    take_pictures()


def separating_feature() -> int:
    """The feature that separates chosen from rejected responses best."""
    return contrast(ContrastConfig(store=str(STORE), top=1))["features"][0]["feature"]


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
