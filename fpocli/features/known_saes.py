"""What sae-lens knows: pre-trained SAEs by model and hook point, and the default one of a site.

A model is known by its hub id or, as a fine-tuned one has a name of its own, by its shape.
"""

import re
from dataclasses import dataclass
from typing import Any

from fpocli.features.site import Site
from fpocli.system.errors import UserError
from fpocli.system.model_folder import SHORT_NAMES, ModelFolder

# (model type, layers, width) of the text model -> the base model of that shape.
_SHAPES = {
    ("gemma2", 26, 2304): "google/gemma-2-2b",
    ("gemma2", 42, 3584): "google/gemma-2-9b",
    ("gemma2", 46, 4608): "google/gemma-2-27b",
    ("gemma3_text", 18, 640): "google/gemma-3-270m",
    ("gemma3_text", 26, 1152): "google/gemma-3-1b-pt",
    ("gemma3_text", 34, 2560): "google/gemma-3-4b-pt",
    ("gemma3_text", 48, 3840): "google/gemma-3-12b-pt",
    ("gemma3_text", 62, 5376): "google/gemma-3-27b-pt",
}
# Hub names that sae-lens spells in another way.
_SPELLING = {"gpt2": "gpt2-small", "mistral-7b-v0.1": "mistral-7b"}
# Gemma Scope has several SAEs of each width: the endings to choose from, the best first. Gemma
# Scope 2 has a medium l0 at four layers of each model only.
_ENDINGS = ("/canonical", "_l0_medium", "_l0_big")
_KINDS = {
    "hook_resid_post": "resid_post",
    "hook_mlp_out": "mlp_out",
    "r": "resid_post",
    "m": "mlp_out",
}
# Where the SAEs of a release read, if their ids name the layer only.
_RELEASES = {
    r"gemma-scope-.*-res(-.*)?|qwen-scope-.*|goodfire-.*": "resid_post",
    r"gemma-scope-.*-mlp(-.*)?": "mlp_out",
}
_WIDTH = re.compile(r"width[_-](\w+?)(?=[/_]|$)|-w(\d+k)|-(\d+k)/|_(\d{4,})$")


@dataclass(frozen=True)
class KnownSae:
    """A pre-trained SAE.

    Args:
        source: release/id, as `--sae` takes it.
        site: where it reads.
        width: number of its features as its name states it, such as 16k; None if it does not.
        l0: mean number of active features at a position; None if sae-lens does not know.
    """

    source: str
    site: Site
    width: str | None
    l0: float | None


def known_saes(model: str) -> list[KnownSae]:
    """The SAEs of a model that read the residual stream after a layer or an MLP's output.

    Args:
        model: hub id, or name in sae-lens.

    Returns:
        sorted by site; empty if sae-lens has none for the model.
    """
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    found = []
    for name, release in get_pretrained_saes_directory().items():
        foreign = re.search("transcoder|temporal", release.conversion_func or "")
        if _key(release.model) != _key(model) or foreign:
            continue
        for sae_id, path in release.saes_map.items():
            site = _site(name, sae_id)
            if site is None:
                continue
            stated = re.search(r"average_l0_(\d+)", path)
            l0 = float(stated[1]) if stated else release.expected_l0[sae_id] or None
            width = _WIDTH.search(f"{name}/{sae_id}")
            named = next(filter(None, width.groups())) if width else None
            found.append(KnownSae(f"{name}/{sae_id}", site, named, l0))
    return sorted(found, key=lambda sae: (sae.site.layer, sae.site.kind))


def base_model(folder: ModelFolder, config: Any) -> str | None:
    """The model whose SAEs fit the model of a folder.

    Args:
        folder: the model.
        config: its text configuration.

    Returns:
        Google's model itself; else the base model of its shape; None for any other shape.
    """
    # Somebody's fine-tuned model may end in the same name.
    if folder.revision is not None and folder.source in SHORT_NAMES.values():
        return folder.source
    return _SHAPES.get((config.model_type, config.num_hidden_layers, config.hidden_size))


def default_saes(folder: ModelFolder, config: Any, sites: list[Site]) -> tuple[list[str], str]:
    """Gemma Scope's SAE of each site: of the smallest width there is, which is 16k
    for most models.

    Args:
        folder: the model.
        config: its text configuration.
        sites: where features are wanted.

    Returns:
        the SAEs as `--sae` takes them, and the model that they were trained on.

    Raises:
        UserError: Gemma Scope has none for this model, or none of a site.
    """
    model = base_model(folder, config)
    choices = preferred_saes(model) if model else {}
    pretrained = _SHAPES.get((config.model_type, config.num_hidden_layers, config.hidden_size))
    if pretrained and not set(sites) <= choices.keys():
        # Of gemma-2-9b-it Gemma Scope covers three layers, of gemma-2-9b all.
        model, choices = pretrained, preferred_saes(pretrained)
    if not choices:
        raise UserError(
            f"no default SAE is known for {folder.source}",
            "name one with --sae: a release/id that `fpo saes MODEL` lists, a folder of sae-lens "
            "or Gemma Scope 2, or a Gemma Scope params.npz",
        )
    for site in sites:
        if site not in choices:
            layers = sorted(known.layer for known in choices if known.kind == site.kind)
            raise UserError(
                f"Gemma Scope has no SAE of {model} at {site}",
                f"its {site.kind} SAEs are of the layers {', '.join(map(str, layers)) or 'none'}; "
                "choose one of them, or name an SAE with --sae",
            )
    return [choices[site] for site in sites], str(model)


def preferred_saes(model: str) -> dict[Site, str]:
    """The default SAE of every site for which Gemma Scope has one of this model."""
    ranked = [
        (_number(sae.width), _ENDINGS.index(ending), sae)
        for sae in known_saes(model)
        for ending in _ENDINGS
        if sae.source.startswith("gemma-scope") and sae.source.endswith(ending)
    ]
    ranked.sort(key=lambda entry: entry[:2], reverse=True)
    # The best SAE of a site comes last, and replaces the others.
    return {sae.site: sae.source for *_, sae in ranked}


def _number(width: str | None) -> float:
    """16384 for 16k."""
    scale = {"k": 2**10, "m": 2**20}
    return int(width[:-1]) * scale[width[-1]] if width else float("inf")


def _key(model: str) -> str:
    """A model's name without its owner, as sae-lens sometimes leaves the owner out."""
    name = model.rpartition("/")[2].lower()
    return _SPELLING.get(name, name)


def _site(release: str, sae_id: str) -> Site | None:
    """Where an SAE reads, by its names; None for a place that is not a site of fpo."""
    if named := re.match(r"blocks\.(\d+)\.(hook_[a-z]+_[a-z]+)", sae_id):
        layer, kind = int(named[1]), named[2]
        if kind == "hook_resid_pre" and layer > 0:
            # What enters a layer is the output of the one before.
            return Site(layer - 1, "resid_post")
        return Site(layer, _KINDS[kind]) if kind in _KINDS else None
    if named := re.match(r"l(\d+)([a-z])_", sae_id):  # Llama Scope
        return Site(int(named[1]), _KINDS[named[2]]) if named[2] in _KINDS else None
    if named := re.match(r"resid_post_layer_(\d+)", sae_id):
        return Site(int(named[1]), "resid_post")
    if named := re.match(r"layer_?(\d+)", sae_id):
        for pattern, kind in _RELEASES.items():
            if re.fullmatch(pattern, release):
                return Site(int(named[1]), kind)
    return None
