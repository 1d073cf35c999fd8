"""Loading under ZeRO-3: each rank holds its part, and the parts are the weights of the files."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import tiny
import torch
from deepspeed.runtime.zero import GatheredParameters
from processes import results, together
from runs import command, finish_all

from fpocli.config import TrainConfig
from fpocli.model.language_model import load_model
from fpocli.model.network import load_network
from fpocli.system.model_folder import find_model
from fpocli.training.deepspeed_config import deepspeed_config
from fpocli.training.engine import partitioned, start_processes

T = TypeVar("T")


def compare(folder: Path) -> None:
    """In each process of two: models loaded in parts and as a whole."""
    start_processes(torch.device("cpu"))
    config = deepspeed_config(TrainConfig(cache="unused", zero=3))
    dtype = torch.bfloat16
    for family in tiny.FAMILIES:
        files = find_model(str(folder / family))
        model = load_model(files, [], dtype, torch.device("cpu"), partitioned(config))
        whole = load_network(files, dtype)
        expected, found = dict(whole.named_parameters()), dict(model.network.named_parameters())
        assert expected.keys() == found.keys()
        assert sum(p.numel() for p in found.values()) == 0
        total = sum(p.numel() for p in expected.values())
        assert sum(p.ds_tensor.numel() for p in found.values()) < 0.51 * total
        assert model.vocabulary == tiny.VOCABULARY
        with GatheredParameters(list(found.values())):
            assert all(torch.equal(found[name], value) for name, value in expected.items())
        buffers = dict(model.network.named_buffers())
        assert all(torch.equal(buffers[name], value) for name, value in whole.named_buffers())

    # As sae-lens, which is imported later in a process that is not forked.
    class Made(torch.nn.Module, Generic[T]):
        pass

    assert Made[int]
    print("compared")


def test_each_rank_holds_its_part_of_the_weights(tmp_path):
    """With tied and untied heads, and rotary buffers."""
    for family in tiny.FAMILIES:
        tiny.model_folder(tmp_path / family, family)
    for done in results(*together([], 2, main=partial(compare, tmp_path))):
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.endswith("compared\n")


def test_all_ranks_stop_if_the_weights_do_not_fit(material, store_path, tmp_path):
    """Rank 0 alone reads them."""
    folder = shutil.copytree(material / "policy", tmp_path / "policy")
    about = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(about | {"intermediate_size": 40}))
    done = finish_all(command(material, tmp_path / "run", model=folder, zero=3), 2)
    assert {process.returncode for process in done} == {2}
    said = "".join(process.stderr for process in done)
    assert said.count("error: ") == 1 and "Traceback" not in said
    assert "mlp.gate_proj.weight" in said
