"""What is said of sae-lens's SAEs, against sae-lens's own code; and the default one of a site."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_cache import write_scope_2
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading import pretrained_saes_directory as directory
from safetensors import safe_open

from fpocli import SaesConfig, UserError, saes
from fpocli.features.known_saes import default_saes, known_saes
from fpocli.features.pretrained import load_encoder
from fpocli.features.site import Site
from fpocli.system.model_folder import ModelFolder


@dataclass
class Shape:
    """The part of a configuration by which a model is known."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int


SHAPES = {
    "google/gemma-2-2b": Shape("gemma2", 26, 2304),
    "google/gemma-2-9b": Shape("gemma2", 42, 3584),
    "google/gemma-2-27b": Shape("gemma2", 46, 4608),
    "google/gemma-3-270m": Shape("gemma3_text", 18, 640),
    "google/gemma-3-1b-pt": Shape("gemma3_text", 26, 1152),
    "google/gemma-3-4b-pt": Shape("gemma3_text", 34, 2560),
    "google/gemma-3-12b-pt": Shape("gemma3_text", 48, 3840),
    "google/gemma-3-27b-pt": Shape("gemma3_text", 62, 5376),
}
TUNED = ModelFolder("runs/sft", Path("runs/sft"), None)


def on_hub(name: str) -> ModelFolder:
    return ModelFolder(name, Path("cache"), "c0ffee")


def hook(source: str) -> str:
    """Where sae-lens's own loader of a release says that an SAE reads."""
    release, _, sae_id = source.partition("/")
    known = directory.get_pretrained_saes_directory()[release]
    path = known.saes_map[sae_id]
    if known.conversion_func == "gemma_2":
        return loaders.get_gemma_2_config_from_hf(known.repo_id, path, "cpu")["hook_name"]
    return loaders._infer_gemma_3_raw_cfg_dict(known.repo_id, path)["hf_hook_point_in"]


HOOKS = {
    "resid_post": {"blocks.{}.hook_resid_post", "model.layers.{}.output"},
    "mlp_out": {"blocks.{}.hook_mlp_out", "model.layers.{}.post_feedforward_layernorm.output"},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["resid_post", "mlp_out"])
def test_the_default_of_every_layer_reads_where_sae_lens_says(name, kind):
    """For a fine-tuned folder of each shape; where there is none, the layers that have one are
    named."""
    shape, found = SHAPES[name], 0
    for layer in range(shape.num_hidden_layers):
        try:
            (source,), model = default_saes(TUNED, shape, [Site(layer, kind)])
        except UserError as error:
            assert name.endswith(("2-27b", "3-27b-pt")), error.hint
            continue
        found += 1
        assert model == name
        assert hook(source) in {text.format(layer) for text in HOOKS[kind]}
        assert "_16k" in source or name.endswith("2-27b")
    expected = {("google/gemma-2-27b", "resid_post"): 3, ("google/gemma-2-27b", "mlp_out"): 0,
                ("google/gemma-3-27b-pt", "mlp_out"): 0}  # fmt: skip
    assert found == expected.get((name, kind), shape.num_hidden_layers)


def test_defaults_by_name():
    def default(name, layer, kind="resid_post"):
        known = name if name in SHAPES else name.replace("-it", "-pt")
        shape = SHAPES.get(known) or SHAPES[name.removesuffix("-it")]
        (source,), model = default_saes(on_hub(name), shape, [Site(layer, kind)])
        return source, model

    assert default("google/gemma-2-2b", 25) == (
        "gemma-scope-2b-pt-res-canonical/layer_25/width_16k/canonical",
        "google/gemma-2-2b",
    )
    assert default("google/gemma-2-9b-it", 20) == (
        "gemma-scope-9b-it-res-canonical/layer_20/width_16k/canonical",
        "google/gemma-2-9b-it",
    )
    # The layers that Gemma Scope did not train on 9b-it have those of 9b.
    assert default("google/gemma-2-9b-it", 21) == (
        "gemma-scope-9b-pt-res-canonical/layer_21/width_16k/canonical",
        "google/gemma-2-9b",
    )
    assert default("google/gemma-3-1b-it", 13) == (
        "gemma-scope-2-1b-it-res/layer_13_width_16k_l0_medium",
        "google/gemma-3-1b-it",
    )
    assert default("google/gemma-3-1b-it", 14, "mlp_out") == (
        "gemma-scope-2-1b-it-mlp-all/layer_14_width_16k_l0_big",
        "google/gemma-3-1b-it",
    )
    assert default("google/gemma-2-27b", 22) == (
        "gemma-scope-27b-pt-res-canonical/layer_22/width_131k/canonical",
        "google/gemma-2-27b",
    )


def test_a_model_without_a_default_is_told_what_to_name():
    with pytest.raises(UserError, match="no default SAE is known for runs/sft") as error:
        default_saes(TUNED, Shape("llama", 30, 576), [Site(3, "resid_post")])
    assert "fpo saes MODEL" in error.value.hint
    with pytest.raises(UserError, match=r"no SAE of google/gemma-2-27b at layer_5") as error:
        default_saes(TUNED, SHAPES["google/gemma-2-27b"], [Site(5, "resid_post")])
    assert "layers 10, 22, 34" in error.value.hint


def test_every_listed_sae_is_one_that_sae_lens_loads_by_this_name():
    known = directory.get_pretrained_saes_directory()
    models = {release.model for release in known.values()}
    listed = [sae for model in models for sae in known_saes(model)]
    assert len(listed) > 4000
    for sae in listed:
        release, _, sae_id = sae.source.partition("/")
        assert sae_id in known[release].saes_map
        assert "att" not in re.split("[-_/]", sae.source) and "transcoder" not in sae.source
        assert sae.l0 is None or sae.l0 > 0


def test_saes_of_a_model_as_a_table_and_as_json(capsys):
    """The SAE of the authors' code is among them: layer 25, average_l0_55."""
    rows = saes(SaesConfig(model="gemma-2-2b", layer=25, json=True))
    assert json.loads(capsys.readouterr().out) == rows
    (authors,) = [row for row in rows if row["id"].endswith("res/layer_25/width_16k/average_l0_55")]
    assert (authors["site"], authors["width"], authors["l0"]) == ("layer_25.resid_post", "16k", 55)
    assert not authors["default"]
    assert [row["site"] for row in rows if row["default"]] == [
        "layer_25.mlp_out", "layer_25.resid_post",
    ]  # fmt: skip
    saes(SaesConfig(model="gpt2", layer=6))
    printed = capsys.readouterr().out
    assert "gpt2-small-res-jb/blocks.7.hook_resid_pre" in printed
    assert "hook_attn_out" not in printed and "hook_resid_mid" not in printed


def test_a_model_or_layer_that_sae_lens_does_not_know(capsys):
    with pytest.raises(UserError, match="knows no SAE of owner/other"):
        saes(SaesConfig(model="owner/other"))
    with pytest.raises(UserError, match="at layer 12") as error:
        saes(SaesConfig(model="gemma-2-27b", layer=12))
    assert "10, 22, 34" in error.value.hint


def test_a_folder_of_gemma_scope_2_equals_sae_lens_own_loader(tmp_path, monkeypatch):
    """sae-lens reads the same two files, and asks the hub for their shapes."""
    place = "resid_post/layer_5_width_16k_l0_medium"
    folder = tmp_path / place
    write_scope_2(folder, 32, 96, "model.layers.5.output", threshold=0.5)

    def shapes(repo_id, filename):
        with safe_open(tmp_path / filename, "np") as weights:
            return {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118

    def download(repo_id, filename, subfolder="", **_):
        return str(tmp_path / subfolder / filename)

    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    monkeypatch.setattr(loaders, "hf_hub_download", download)
    from sae_lens import SAE

    theirs = SAE.from_pretrained("gemma-scope-2-270m-pt-res", "layer_5_width_16k_l0_medium")
    ours = load_encoder(str(folder), torch.device("cpu"))
    states = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.sae.encode(states), theirs.encode(states))
    assert 0 < (ours.sae.encode(states) > 0).float().mean() < 0.9
    np.testing.assert_allclose(ours.pool(states), theirs.encode(states).mean(0).detach(), rtol=1e-6)


def test_a_transcoder_in_gemma_scope_2s_layout_is_refused(tmp_path):
    folder = tmp_path / "transcoder"
    write_scope_2(folder, 32, 96, "model.layers.5.pre_feedforward_layernorm.output", threshold=0.5)
    about = json.loads((folder / "config.json").read_text())
    about["hf_hook_point_out"] = "model.layers.5.post_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="it is a transcoder"):
        load_encoder(str(folder), torch.device("cpu"))
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="does not describe a jump_relu SAE"):
        load_encoder(str(folder), torch.device("cpu"))
