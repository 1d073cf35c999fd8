"""The run that several files compare others with."""

from pathlib import Path

import pytest
from runs import run


@pytest.fixture(scope="session")
def baseline(material, store_path, tmp_path_factory) -> Path:
    """A float32 run, ZeRO 2, one process."""
    out = tmp_path_factory.mktemp("baseline") / "run"
    run(material, out, "--no-bf16")
    return out
