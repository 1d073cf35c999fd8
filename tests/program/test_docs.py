"""What the docs say about the tests is true."""

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("page", ["reliability.md", "security.md"])
def test_every_promise_names_tests_that_exist(page):
    text = (TESTS.parent / "docs" / page).read_text()
    files = {file.name: file.read_text() for file in TESTS.rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+(?!\w|\.py)", text.replace(".py", ".py ")))
    named = {name for name in named if f"{name}.py" not in files}
    assert len(named) > 20
    for name in named:
        assert any(f"def {name}(" in source for source in files.values()), name
    assert set(re.findall(r"\btest_\w+\.py", text)) <= files.keys()
