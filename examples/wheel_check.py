"""Builds the wheel, installs it into an empty environment and runs the demo's first step from it.

    make wheel-check

The environment sees the dependencies of the one this runs in, but the package comes from the wheel.
"""

import site
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Build, install, run; stop at the first thing that fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-w", folder, ROOT], check=True)
        (wheel,) = folder.glob("*.whl")
        check_modules(wheel)
        python = install(wheel, folder / "environment")
        where = run([python, "-c", "import fpocli; print(fpocli.__file__)"], folder)
        if not where.startswith(str(folder)):
            sys.exit(f"fpocli came from {where}, not from the wheel")
        demo = ROOT / "demo"
        print(
            run(
                [
                    *(python, "-m", "fpocli", "cache", "--out", "ref.zarr", "--limit", "2"),
                    *("--model", demo / "SmolLM2-135M-Instruct", "--dtype", "float32"),
                    *("--layer", "24", "--sae", demo / "sae"),
                    *("--data", ROOT / "examples/preferences.jsonl"),
                ],
                folder,
            )
        )
        print(run([python, "-m", "fpocli", "inspect", "ref.zarr", "--html", "ref.html"], folder))


def check_modules(wheel: Path) -> None:
    """Every module and template of the repository is in the wheel, and nothing else."""
    there = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = (file for file in (ROOT / "fpocli").rglob("*") if file.is_file())
    expected = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}
    if there != expected:
        sys.exit(f"the wheel's files differ from the repository's: {there ^ expected}")


def install(wheel: Path, folder: Path) -> Path:
    """A new environment with the wheel in it; its Python."""
    venv.create(folder, with_pip=False)
    (own,) = folder.glob("lib/python*/site-packages")
    # Searched after the environment's own packages, so that the wheel comes first.
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", own, wheel]
    subprocess.run(pip, check=True)
    return folder / "bin/python"


def run(words: list, folder: Path) -> str:
    """What a command prints."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}")
    return done.stdout or done.stderr


if __name__ == "__main__":
    main()
