"""A hub cache in the layout of huggingface_hub, made by the tests."""

import json

import numpy as np
from safetensors.numpy import save_file

COMMIT = "c5ebcd40d208330abc697524c919956e692655cf"


def snapshot(hub, name, kind="model"):
    """The folder of a repository's files in the layout of the hub's cache."""
    repository = hub / (f"{kind}s--" + name.replace("/", "--"))
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    path = repository / "snapshots" / COMMIT
    path.mkdir(parents=True)
    return path


def write_scope(path, width, features, dtype, threshold):
    """A random SAE in Gemma Scope's layout, with thresholds from `threshold` to twice that."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return (random.standard_normal(shape, np.float32) * width**-0.5).astype(dtype)

    np.savez(
        path,
        W_enc=draw(width, features),
        W_dec=draw(features, width),
        b_enc=draw(features),
        b_dec=draw(width),
        threshold=(threshold * random.uniform(1, 2, features)).astype(dtype),
    )


def write_scope_2(folder, width, features, hook, threshold):
    """A random SAE in Gemma Scope 2's layout: a folder with config.json and params.safetensors."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape, np.float32) * np.float32(width**-0.5)

    about = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-270m-pt",
        "hf_hook_point_in": hook,
        "width": features,
        "type": "sae",
    }
    (folder / "config.json").write_text(json.dumps(about))
    arrays = {
        "w_enc": draw(width, features),
        "w_dec": draw(features, width),
        "b_enc": draw(features),
        "b_dec": draw(width),
        "threshold": (threshold * random.uniform(1, 2, features)).astype(np.float32),
    }
    save_file(arrays, folder / "params.safetensors")
