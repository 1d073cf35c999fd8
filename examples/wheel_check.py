"""Builds the sdist and from it the wheel, installs that and runs the demo's first step from it.

    make wheel-check

The environment is empty but sees the dependencies of the one this runs in; the package comes from
the wheel.
"""

import site
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path
from zipfile import ZipFile

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Build, install, run; stop at the first thing that fails."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = build_sdist(folder)
        check_sdist(sdist)
        pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
        subprocess.run([*pip, "-w", folder, sdist], check=True)
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


def build_sdist(folder: Path) -> Path:
    """The archive of the sources, by the backend that pyproject.toml names."""
    backend = "import sys; from setuptools.build_meta import build_sdist as b; b(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-c", backend, folder], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
    )
    (sdist,) = folder.glob("*.tar.gz")
    return sdist


def check_sdist(sdist: Path) -> None:
    """Every module is in the archive, beside metadata that an index accepts, and nothing else."""
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.isfile()]
        names = {member.name.partition("/")[2] for member in members}
        info = archive.extractfile(next(one for one in members if one.name.endswith("/PKG-INFO")))
        assert info is not None
        about = Metadata.from_email(info.read(), validate=True)
    if about.description_content_type != "text/markdown" or not about.description:
        sys.exit("the sdist's description is not README.md")
    beside = {name for name in names if not name.startswith(("fpocli/", "fpocli.egg-info/"))}
    expected = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    if beside != expected:
        sys.exit(f"the sdist has other files than expected: {beside ^ expected}")
    compare("sdist", {name for name in names if name.startswith("fpocli/")})


def check_modules(wheel: Path) -> None:
    """Every module and template of the repository is in the wheel, and nothing else."""
    compare("wheel", {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name})


def compare(kind: str, there: set[str]) -> None:
    """Stop unless these are the files of the package."""
    files = (file for file in (ROOT / "fpocli").rglob("*") if file.is_file())
    expected = {str(file.relative_to(ROOT)) for file in files if file.suffix != ".pyc"}
    if there != expected:
        sys.exit(f"the {kind}'s files differ from the repository's: {there ^ expected}")


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
