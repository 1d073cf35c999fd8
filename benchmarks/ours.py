"""fpo as a contestant: a round is an optimiser step of `fpo train`, or a block of `fpo cache`."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import forget_peak, load_encoders, memory, serve

from fpocli.caching.score_block import score_block
from fpocli.config import TrainConfig
from fpocli.features.site import Site
from fpocli.model.language_model import load_model
from fpocli.model.network import choose_device
from fpocli.model.packing import default_packed_length
from fpocli.scoring.loading import load_reference
from fpocli.scoring.score import score
from fpocli.store.place import Folder
from fpocli.store.reader import Store
from fpocli.store.records import TokenPairs
from fpocli.store.writer import StoreWriter
from fpocli.system.console import progress
from fpocli.system.model_folder import find_model
from fpocli.training.deepspeed_config import deepspeed_config
from fpocli.training.engine import backward, make_engine, start_processes, take_step
from fpocli.training.objective import objective
from fpocli.training.pair_loader import PairLoader


def serve_steps(line: Any, config: TrainConfig) -> None:
    """Take an optimiser step in each round.

    A round's peak is of the memory since the last round; that of the first includes loading.

    Args:
        line: to the parent, from `take_stdout`.
        config: of the training, with its model.
    """
    device = choose_device(None)
    start_processes(device)
    store, folder = Store.open(config.cache), find_model(config.model)
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    # As fpo train does, only what the method needs is loaded.
    constrained = config.constraint == "features"
    sites = list(store.sites) if constrained else []
    model = load_model(folder, [Site.parse(name) for name in sites], dtype, device)
    model.network.activation_checkpointing_enable()
    encoders = load_encoders(store, device) if constrained else {}
    from_store = store.distributions is not None and not config.exact_kl
    reference = None
    if config.needs_kl and not from_store:
        reference = load_reference(folder, [], dtype, device)
    engine = make_engine(model, config, deepspeed_config(config))
    loader = PairLoader(
        store, batch_size=config.batch_size, packed_length=default_packed_length(device),
        eval_fraction=0, seed=0, rank=0, world=1, sites=sites,
    )  # fmt: skip
    with_top = config.needs_kl and from_store
    steps = iter(loader.steps(0, loader.steps_per_epoch, device, with_top=with_top))

    def step(number: int) -> dict[str, Any]:
        began = time.perf_counter()
        engine.train()
        rows = next(steps)
        for row in rows:
            output = reference(row.batch) if reference else None
            scores = score(engine, encoders, row.batch, output, row.top)
            loss, _ = objective(scores, row.reference, encoders, config)
            backward(engine, (row.pair_weights * loss).sum(), row is rows[-1])
        take_step(engine, config.lr, number)
        return {"seconds": time.perf_counter() - began, "peak": _peak(device)}

    serve(line, step)


def serve_blocks(line: Any, store: Store, model: str) -> None:
    """Score, compress and write the store's block of that number in each round, in a new store.

    Args:
        line: to the parent, from `take_stdout`.
        store: has the pairs, and decides what is stored of the reference.
        model: the reference.
    """
    device = choose_device(None)
    tokens = TokenPairs(*(store.read_array(name) for name in ("tokens", "spans", "source_row")))
    dtype = getattr(torch, store.meta["model"]["dtype"])
    with tempfile.TemporaryDirectory() as folder:
        out = StoreWriter.create(Folder(Path(folder) / "ref.zarr"), dict(store.meta), tokens)
        sites = [Site.parse(name) for name in store.sites]
        network = load_model(find_model(model), sites, dtype, device).eval()
        encoders = load_encoders(store, device)

        def block(number: int) -> dict[str, Any]:
            began = time.perf_counter()
            with progress("", 1) as bar:
                budget = default_packed_length(device)
                scored = score_block(network, encoders, out.meta, out.tokens(number), budget, bar)
                written = time.perf_counter()
                out.write_block(number, scored.reference, scored.totals, scored.top)
            now = time.perf_counter()
            return {"seconds": now - began, "write": now - written, "peak": _peak(device)}

        serve(line, block)


def _peak(device: torch.device) -> float:
    """Bytes: the most that was held on the GPU, or by the process, since this was last called."""
    if device.type == "cuda":
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most
    most = memory("VmHWM") * 1e6
    forget_peak()
    return most
