"""examples/trl_bridge.py, on one process and on two, which is `accelerate launch` without it."""

import json
import re
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from processes import results, together
from safetensors.numpy import load_file

# TRL still uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")
SCRIPT = Path(__file__).parents[2] / "examples/trl_bridge.py"


@pytest.fixture(scope="module")
def runs(material, store_path, tmp_path_factory):
    """Three steps on the same pairs: by one process, and by two."""
    folder = tmp_path_factory.mktemp("bridge")
    made = {}
    for processes in (1, 2):
        out = folder / str(processes)
        words = f"""--cache {store_path} --model {material / "model"} --output_dir {out} --k 5
            --per_device_train_batch_size {4 // processes} --max_steps 3 --learning_rate 1e-3
            --lr_scheduler_type constant --max_length 512 --bf16 false --use_cpu true
            --report_to none --disable_tqdm true --dataloader_pin_memory false""".split()
        main = partial(runpy.run_path, str(SCRIPT), run_name="__main__")
        for done in results(*together(words, processes, main=main)):
            assert done.returncode == 0, done.stderr[-3000:]
        made[processes] = out
    return made


def test_two_processes_train_what_one_does(runs):
    one, two = (load_file(runs[n] / "model.safetensors") for n in (1, 2))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(values, two[name], atol=2e-5, err_msg=name)


def test_what_is_logged_is_the_mean_over_ranks(runs):
    logged = [
        json.loads((runs[n] / "checkpoint-3/trainer_state.json").read_text())["log_history"]
        for n in (1, 2)
    ]
    for one, two in zip(*logged, strict=True):
        for name in ("loss", "delta", "distance/rejected", "rewards/margins"):
            assert one.get(name) == pytest.approx(two.get(name), abs=1e-4), name
    assert logged[0][2]["distance/rejected"] > 1e-4


def test_the_lines_of_the_docs_run(material, store_path, tmp_path, monkeypatch):
    """Those of docs/bridges.md, as they are printed there."""
    page = (SCRIPT.parents[1] / "docs/bridges.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(material / "model")
    Path("ref.zarr").symlink_to(store_path)
    names = {}
    # TRL asks for it where there is no GPU.
    exec(lines.replace("max_length=", "use_cpu=True, max_length="), names)
    logged = names["trainer"].state.log_history
    assert logged[-1]["train_loss"] == pytest.approx(np.log(2), abs=0.05)
