"""What can be known of the Dockerfile without docker; `make lint` runs hadolint on it."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
# Each instruction in one line.
LINES = [
    line.split(maxsplit=1)
    for line in re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.M)
    .replace("\\\n", "")
    .splitlines()
    if line
]


def values(name: str) -> list[str]:
    return [value for instruction, value in LINES if instruction == name]


def test_everything_that_is_copied_exists():
    stages = [value.split()[-1] for value in values("FROM") if " AS " in value]
    copied = []
    for *sources, _ in map(str.split, values("COPY")):
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
        else:
            assert all((ROOT / source).exists() for source in sources)
            copied += sources
    # What the package is built from.
    assert {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], "fpocli"} <= {*copied}


def test_the_dependencies_are_those_of_the_project_with_extras():
    """The command of the Dockerfile that lists them is run."""
    (command,) = (value for value in values("RUN") if "tomllib" in value)
    python, *words = shlex.split(command.partition(">")[0])
    assert python == "python"
    listed = subprocess.check_output([sys.executable, *words], cwd=ROOT, text=True).splitlines()
    extras = re.findall(r"extras\['(\w+)'\]", command)
    assert extras == ["cuda", "cloud", "ray"]
    expected = [name for extra in extras for name in PROJECT["optional-dependencies"][extra]]
    assert listed == PROJECT["dependencies"] + expected


def test_versions_are_those_of_the_constraints():
    first, last = (value for value in values("RUN") if "pip install" in value)
    assert "pip install --no-cache-dir -c constraints.txt -r requirements.txt" in first
    assert last == "pip install --no-cache-dir --no-deps ."
    assert "torch" in PINNED and "torch" not in first + last
    for extra in ("cuda", "cloud", "ray"):
        for requirement in PROJECT["optional-dependencies"][extra]:
            assert re.match(r"[\w-]+", requirement)[0] in PINNED


def test_the_dependencies_are_installed_before_the_code_is_copied():
    code = LINES.index(["COPY", "fpocli fpocli"])
    places = [place for place, (_, value) in enumerate(LINES) if "requirements.txt" in value]
    assert places and max(places) < code


def test_the_image_runs_fpo_on_the_cuda_runtime_as_an_ordinary_user():
    assert re.match(r"nvidia/cuda:[\d.]+-runtime-", values("FROM")[-1])
    (user,) = values("USER")
    assert f"useradd --uid {user} " in values("RUN")[-1] and user != "0"
    assert values("ENTRYPOINT") == ['["fpo"]'] and "fpo" in PROJECT["scripts"]
