"""fpo train: read the store, score with the policy, step, log, save."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fpocli.config import LOGITS, TrainConfig
from fpocli.features.site import Site
from fpocli.features.weights import load_feature_weights
from fpocli.model.attention import choose_kernel
from fpocli.model.language_model import LanguageModel, load_model
from fpocli.model.network import choose_device
from fpocli.model.packing import default_packed_length
from fpocli.scoring.loading import find_reference, load_reference, sites_of, tokenizer_of
from fpocli.scoring.logit_weights import logit_weights, token_counts
from fpocli.scoring.saes import load_encoders, sae_sources
from fpocli.scoring.score import score
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store
from fpocli.system.console import progress, say, warn
from fpocli.system.errors import UserError
from fpocli.system.files import resolve_last_part
from fpocli.system.heartbeat import heartbeat
from fpocli.system.model_folder import find_model
from fpocli.system.ranks import Ranks
from fpocli.training.checkpoints import load_checkpoint, save_checkpoint
from fpocli.training.chosen_fall import ChosenFall
from fpocli.training.deepspeed_config import deepspeed_config
from fpocli.training.engine import (
    backward,
    gather_weights,
    make_engine,
    partitioned,
    shard,
    start_processes,
    take_step,
    whole,
)
from fpocli.training.first_step import (
    check_dtype_and_kernel,
    check_policy_is_reference,
    check_store_serves,
)
from fpocli.training.held_out import held_out_means
from fpocli.training.hold import HeldAlpha
from fpocli.training.means import Means, values_to_show
from fpocli.training.memory import MemoryMeter
from fpocli.training.objective import objective, shares_of_groups
from fpocli.training.pair_loader import PairLoader
from fpocli.training.run_folder import RunFolder, locked_run_folder
from fpocli.training.schedule import learning_rate, warmup_steps
from fpocli.training.where import pairs_where


def train(settings: TrainConfig) -> Path:
    """Train a policy against a store, or resume a run that was stopped.

    Args:
        settings: of the run.

    Returns:
        The folder of the trained model, in transformers' format.

    Raises:
        UserError: the store, model, SAE or run folder cannot be used; see its hint.
    """
    settings = replace(settings, out=str(resolve_last_part(settings.out)))
    store = Store.open(locally_cached(settings.cache))
    check_store_serves(store, settings)
    device = choose_device(settings.device)
    rank, world = start_processes(device)
    if settings.gpus and settings.gpus != world:
        raise UserError(
            f"gpus is {settings.gpus}, but the number of processes is {world}",
            "use the command fpo train --gpus, which starts them; from Python, use torchrun",
        )
    with heartbeat(rank, world), locked_run_folder(Path(settings.out)) as may_write:
        return _train(settings, store, device, may_write)


def _train(
    settings: TrainConfig, store: Store, device: torch.device, may_write: Callable[[], None]
) -> Path:
    """The stage itself, while this run holds the lock of its folder."""
    # -- settings and files, checked before any model is loaded --------------------------------
    sites = sites_of(store, settings.at) if settings.constraint == "features" else []
    world = Ranks.connected().world
    loader = PairLoader(
        store,
        batch_size=settings.batch_size,
        packed_length=settings.packed_length or default_packed_length(device),
        eval_fraction=settings.eval_fraction,
        seed=settings.seed,
        rank=Ranks.connected().rank,
        world=world,
        sites=[str(site) for site in sites],
        where=pairs_where(store, settings.where),
    )
    steps = settings.epochs * loader.steps_per_epoch
    if not steps:
        raise UserError(
            "no pairs are left for training", "use a smaller --eval-fraction, or another --where"
        )
    dtype = "bfloat16" if settings.bf16 else "float32"
    check_dtype_and_kernel(store, dtype, choose_kernel(device), settings.allow)
    deepspeed = deepspeed_config(settings)
    omegas = {}
    if settings.feature_weights and settings.feature_weights != LOGITS:
        omegas = load_feature_weights(settings.feature_weights, store.widths)
    run = RunFolder(settings, store.meta["fingerprint"])
    if run.finished:
        say(f"{run.final} is complete; --overwrite trains it again")
        return run.final

    # -- the policy, its SAEs and the engine -----------------------------------------------------
    # The KL needs the reference's distributions: those of the store, or else the reference itself.
    from_store = store.distributions is not None and not settings.exact_kl
    train_top = settings.needs_kl and from_store
    measure_top = (settings.needs_kl or settings.measure_kl) and from_store
    with_reference = settings.needs_kl and not from_store
    model, tokenizer, reference = _load_models(
        store,
        settings,
        sites,
        deepspeed,
        device,
        with_reference=(settings.needs_kl or settings.measure_kl) and not from_store,
    )
    if measure_top and store.distributions:
        model.require_vocabulary(store.distributions.vocabulary)
    encoders = {}
    if sites:
        encoders = load_encoders(store, sites, settings.sae, model.config.hidden_size, device)
    engine = make_engine(model, settings, deepspeed)
    # Under ZeRO-3 a model runs only once its engine gathers what each layer needs.
    check_against_transformers(model.eval(), store.tokens(0))
    if settings.feature_weights == LOGITS:
        # By the starting weights, also where a run is resumed.
        sources = sae_sources(store, sites, settings.sae)
        with whole(model.network.get_output_embeddings().weight):
            omegas = logit_weights(sources, model.network, token_counts(store, model.vocabulary))
    # Those of sites that are not compared have nothing to act on.
    weights = {site: omegas[site].to(device) for site in encoders if site in omegas}
    done, alpha = load_checkpoint(engine, run.checkpoints, settings.alpha)
    held_alpha = HeldAlpha(alpha, settings.hold, settings.beta)
    chosen_fall = ChosenFall(from_reference=settings.model is None)
    for line in run.resume_at(done):
        chosen_fall.watch(line)
        held_alpha.watch(line)
    say(
        f"{settings.method}{_kl_text(settings, store)} on {loader.training_pairs:,} pairs, "
        f"{loader.held_out_pairs:,} held out; steps {done} to {steps} of "
        f"{settings.batch_size} pairs, packed into sequences of {loader.packed_length:,} tokens; "
        f"{world} {device.type} process{'es' if world > 1 else ''}, ZeRO {settings.zero}; "
        f"{model.kernels(distributions=settings.needs_kl)}"
    )
    if warmup_steps(steps, settings) > steps:
        warn(
            f"note: the warm-up of {warmup_steps(steps, settings)} steps is longer than the run, "
            f"so the learning rate never reaches {settings.lr}"
        )

    def measure(step: int) -> None:
        if loader.held_out_pairs:
            means = held_out_means(
                engine,
                encoders,
                loader.evaluation(device, with_top=measure_top),
                settings,
                weights,
                reference,
                f"step {step}, held-out pairs",
                alpha=held_alpha.alpha,
            )
            run.log({"step": step, "split": "eval"} | means)

    # -- the loop ----------------------------------------------------------------------------------
    if done == 0:
        sample = next(iter(loader.steps(0, 1, device, with_top=train_top)))[0]
        check_policy_is_reference(engine, encoders, store, sample, settings)
        measure(0)
    memory = MemoryMeter(device)
    with progress("Training", steps, done) as bar:
        began, waited = time.perf_counter(), 0.0
        prefetched = loader.steps(done, steps, device, with_top=train_top)
        for step, micro_batches in enumerate(prefetched, done):
            lr = learning_rate(step, steps, settings)
            means = Means()
            engine.train()
            for number, micro in enumerate(micro_batches, 1):
                output = reference(micro.batch) if with_reference else None
                scores = score(engine, encoders, micro.batch, output, micro.top)
                loss, metrics = objective(
                    scores, micro.reference, encoders, settings, weights, held_alpha.alpha
                )
                # DeepSpeed averages over ranks, while the weights already make this the mean over
                # the step's pairs.
                backward(
                    engine, (micro.pair_weights * loss).sum() * world, number == len(micro_batches)
                )
                means.add(metrics | {"tokens": micro.tokens}, micro.pair_weights, micro.pairs)
                bar.advance(1 / len(micro_batches))
            # Before the optimiser steps, which it must not do with non-finite values.
            line = shares_of_groups(means.result(f"step {step + 1}"))
            norm = take_step(engine, lr, step + 1)
            now = time.perf_counter()
            tokens = line["tokens"] * loader.size(step)
            line |= memory.step() | {
                "gradient_norm": norm,
                "lr": lr,
                "seconds": now - began,
                "tokens_per_second": tokens / (now - began),
                "data_wait": (prefetched.waited - waited) / (now - began),
            }
            if settings.hold is not None:
                line["alpha"] = held_alpha.alpha
            run.log({"step": step + 1, "split": "train"} | line)
            held_alpha.update(line)
            chosen_fall.watch(line)
            bar.advance(0, pairs=loader.size(step), tokens=tokens)
            bar.show(values_to_show(line))
            if step + 1 < steps and (step + 1) % (settings.eval_every or steps) == 0:
                measure(step + 1)
            if (step + 1) % settings.save_every == 0 and step + 1 < steps:
                may_write()
                save_checkpoint(
                    engine, run.checkpoints, step + 1, held_alpha.alpha, settings.keep_checkpoints
                )
            memory.restart()
            began, waited = time.perf_counter(), prefetched.waited
    held_alpha.warn_if_missed()
    measure(steps)

    # -- the result -----------------------------------------------------------------------------
    state = gather_weights(engine)
    may_write()
    if state is not None:
        run.save_model(model.network, state, tokenizer, store)
        say(f"the trained model is in {run.final}")
    torch.distributed.barrier()
    return run.final


def _kl_text(settings: TrainConfig, store: Store) -> str:
    """Where the KL of the constraint comes from, for a message; nothing without it."""
    if not settings.needs_kl:
        return ""
    if store.distributions is None or settings.exact_kl:
        return " with the reference in memory"
    return f" with {store.distributions.words} of the store"


def _load_models(
    store: Store,
    settings: TrainConfig,
    sites: list[Site],
    deepspeed: dict[str, Any],
    device: torch.device,
    *,
    with_reference: bool,
) -> tuple[LanguageModel, Any, Any]:
    """The policy with its starting weights, its tokeniser, and the frozen reference if it is
    needed: complete on each rank, or partitioned under ZeRO-3 as the policy is."""
    ranks = Ranks.connected()
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    trust = settings.trust_remote_code
    if settings.model:
        folder = find_model(settings.model, trust_remote_code=trust)
    else:
        folder = find_reference(store, settings.reference, trust_remote_code=trust)
    tokenizer = tokenizer_of(store, folder)
    # Under ZeRO-3 rank 0 alone sees what is wrong with the files.
    model = ranks.on_each(lambda: load_model(folder, sites, dtype, device, partitioned(deepspeed)))
    if settings.activation_checkpointing:
        model.network.activation_checkpointing_enable()
    if not with_reference:
        return model, tokenizer, None
    original = (
        find_reference(store, settings.reference, trust_remote_code=trust)
        if settings.model
        else folder
    )
    reference = ranks.on_each(
        lambda: load_reference(original, [], dtype, device, partitioned(deepspeed))
    )
    model.require_vocabulary(reference.vocabulary)
    sharded = shard(reference, deepspeed) if settings.zero == 3 else reference
    if settings.model:
        check_against_transformers(reference, store.tokens(0))
    return model, tokenizer, sharded
