"""Writes the golden stores. Run once per version of the format, and not again:

cd tests/golden && python make.py
"""

import json
import sys
import tempfile
from pathlib import Path

import zarr

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))

import tiny  # noqa: E402
from stores import write_pairs  # noqa: E402

from fpocli import CacheConfig, cache  # noqa: E402
from fpocli.store.schema import VERSION  # noqa: E402


def main() -> None:
    """Cache seven pairs of two sources in three blocks at two sites, two features of one site for
    every response, and write every value next to the store."""
    import os

    os.chdir(tempfile.mkdtemp())
    tiny.model_folder(Path("model"))
    tiny.sae_folder(Path("sae"))
    write_pairs(Path("pairs.jsonl"), 5)
    write_pairs(Path("more.jsonl"), 4, seed=1)
    Path("keep.yaml").write_text("layer_3.resid_post: {groups: {two: [1, 95]}}")
    path = HERE / f"ref-{VERSION}.zarr"
    cache(
        CacheConfig(
            model="model",
            layer=[1, 3],
            sae=["sae", "sae"],
            data=["pairs.jsonl:2.5", "more.jsonl"],
            dtype="float32",
            device="cpu",
            block=3,
            top_k="20",
            keep="keep.yaml",
            out="ref.zarr",
        )
    )
    Path("ref.zarr").rename(path)
    group = zarr.open_group(path, mode="r")
    arrays = {
        name: {"dtype": str(item.dtype), "shape": item.shape, "data": item[:].ravel().tolist()}
        for name, item in group.members(max_depth=None)
        if isinstance(item, zarr.Array)
    }
    about = {"fpo": group.attrs["fpo"], "arrays": arrays}
    path.with_suffix(".json").write_text(json.dumps(about))


main()
