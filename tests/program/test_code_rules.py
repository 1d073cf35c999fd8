"""Conventions of the code: small files, a docstring for every room and everything public."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "fpocli"
FILES = sorted(PACKAGE.rglob("*.py"))
names = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))


@names
def test_no_file_is_longer_than_300_lines(file):
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize(
    "room", sorted(p for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())
)
def test_every_room_says_in_a_sentence_what_it_is(room):
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text()))
    assert text and text.endswith("."), room


def test_one_file_makes_the_consoles():
    """There NO_COLOR, --quiet and --json-logs are respected."""
    made = [file.name for file in FILES if "Console(" in file.read_text()]
    assert made == ["console.py"]


@names
def test_everything_public_has_a_docstring(file):
    tree = ast.parse(file.read_text())
    assert ast.get_docstring(tree), "the file itself"
    kinds = (ast.FunctionDef, ast.ClassDef)
    members = [node for node in tree.body if isinstance(node, kinds)]
    members += [
        member
        for node in members
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
        for member in node.body
        if isinstance(member, kinds)
    ]
    for node in members:
        assert node.name.startswith("_") or ast.get_docstring(node), node.name
