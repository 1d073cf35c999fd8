"""Dropout, and the noise of routers, are off."""

from pathlib import Path

import families
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from fpocli.model.network import load_network
from fpocli.system.model_folder import ModelFolder

NOISE = ("drop", "jitter")


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "gpt_neox", "llama", "mixtral", "opt", "phi"])
def test_training_mode_computes_what_evaluation_does(tmp_path, family):
    """With every dropout and every noise that the configuration has."""
    config = families.network(family).config
    noise = [name for name in config.to_dict() if any(word in name for word in NOISE)]
    for name in noise:
        if isinstance(getattr(config, name), float):
            setattr(config, name, 0.5)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    network.save_pretrained(tmp_path)
    ids = torch.randint(5, tiny.VOCABULARY, (2, 30))
    if noise:
        with torch.no_grad():
            assert not torch.equal(network.train()(ids).logits, network.eval()(ids).logits)
    loaded = load_network(ModelFolder("it", Path(tmp_path), None), torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.train()(ids).logits, loaded.eval()(ids).logits)
    saved = {name: getattr(loaded.config, name) for name in noise}
    assert saved == {name: getattr(config, name) for name in noise}
