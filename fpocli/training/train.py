"""fpo train: read the store, score with the policy, step, log, save."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fpocli.config import LOGITS, TrainConfig
from fpocli.features.weights import load_feature_weights
from fpocli.model.attention import choose_kernel
from fpocli.model.network import choose_device
from fpocli.scoring.loading import sites_of
from fpocli.scoring.logit_weights import logit_weights, token_counts
from fpocli.scoring.saes import load_encoders, sae_sources
from fpocli.scoring.score import score
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store
from fpocli.system.console import progress, say
from fpocli.system.errors import UserError
from fpocli.system.files import resolve_last_part
from fpocli.system.heartbeat import heartbeat
from fpocli.system.ranks import Ranks
from fpocli.system.signals import resume_note
from fpocli.tracking.trackers import Trackers
from fpocli.training.announce import announce
from fpocli.training.checkpoints import (
    checkpoint_of,
    load_checkpoint,
    load_from,
    save_checkpoint,
)
from fpocli.training.chosen_fall import ChosenFall
from fpocli.training.deepspeed_config import deepspeed_config
from fpocli.training.engine import (
    backward,
    gather_weights,
    make_engine,
    start_processes,
    take_step,
    whole,
)
from fpocli.training.first_step import (
    check_4bit,
    check_dtype_and_kernel,
    check_policy_is_reference,
    check_store_serves,
)
from fpocli.training.held_out import held_out_means, open_held_out_store, open_loaders
from fpocli.training.hold import HeldAlpha
from fpocli.training.means import Means, values_to_show
from fpocli.training.model_card import model_card
from fpocli.training.models import load_models, require_packages
from fpocli.training.objective import objective, shares_of_groups
from fpocli.training.run_folder import RunFolder, locked_run_folder
from fpocli.training.schedule import learning_rate, total_steps
from fpocli.training.start import record_start, starting_revision
from fpocli.training.step_meter import StepMeter
from fpocli.training.stopping import BestStep, TimeLimit


def train(settings: TrainConfig) -> Path | None:
    """Train a policy against a store, or resume a run that was stopped.

    Args:
        settings: of the run.

    Returns:
        The folder of the trained model, in transformers' format; None if --max-minutes ended the
        command before the run was complete.

    Raises:
        UserError: the store, model, SAE or run folder cannot be used; see its hint.
    """
    limit = TimeLimit(settings.max_minutes)
    settings = replace(settings, out=str(resolve_last_part(settings.out)))
    require_packages(settings)
    store = Store.open(locally_cached(settings.cache))
    check_store_serves(store, settings)
    check_4bit(store, settings)
    held_out = open_held_out_store(store, settings)
    device = choose_device(settings.device)
    rank, world = start_processes(device)
    if settings.gpus and settings.gpus != world:
        raise UserError(
            f"gpus is {settings.gpus}, but the number of processes is {world}",
            "use the command fpo train --gpus, which starts them; from Python, use torchrun",
        )
    with (
        heartbeat(rank, world),
        locked_run_folder(Path(settings.out)) as may_write,
        Trackers(settings.track, Ranks.connected()) as trackers,
    ):
        return _train(settings, store, held_out, device, limit, trackers, may_write)


def _train(
    settings: TrainConfig,
    store: Store,
    other: Store | None,
    device: torch.device,
    limit: TimeLimit,
    trackers: Trackers,
    may_write: Callable[[], None],
) -> Path | None:
    """The stage itself, while this run holds the lock of its folder."""
    # -- settings and files, checked before any model is loaded --------------------------------
    sites = sites_of(store, settings.at) if settings.constraint == "features" else []
    loader, held_out = open_loaders(settings, store, other, sites, device)
    steps = total_steps(loader.steps_per_epoch, settings)
    dtype = "bfloat16" if settings.bf16 else "float32"
    for one in filter(None, (store, other)):
        check_dtype_and_kernel(one, dtype, choose_kernel(device), settings.allow)
    deepspeed = deepspeed_config(settings)
    omegas = {}
    if settings.feature_weights and settings.feature_weights != LOGITS:
        omegas = load_feature_weights(settings.feature_weights, store.widths)
    fingerprints = [one.meta["fingerprint"] for one in (store, other) if one]
    run = RunFolder(settings, *fingerprints)
    if run.finished:
        say(f"{run.final} is complete; --overwrite trains it again")
        return run.final
    trackers.open(run.folder, asdict(settings))

    def log(line: dict[str, Any]) -> None:
        run.log(line)
        trackers.log(line)

    # -- the policy, its SAEs and the engine -----------------------------------------------------
    # The KL needs the reference's distributions: those of the store, or else the reference itself.
    from_store = store.distributions is not None and not settings.exact_kl
    train_top = settings.needs_kl and from_store
    measure_top = (settings.needs_kl or settings.measure_kl) and from_store
    with_reference = settings.needs_kl and not from_store
    model, tokenizer, reference, folder = load_models(
        store,
        settings,
        sites,
        deepspeed,
        device,
        revision=starting_revision(run.folder),
        with_reference=(settings.needs_kl or settings.measure_kl) and not from_store,
    )
    record_start(run.folder, folder, settings)
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
    chosen_fall = ChosenFall(steps, from_reference=settings.model is None)
    best = BestStep(settings)
    for line in run.resume_at(done):
        trackers.log(line)
        best.watch(line)
        if line["split"] == "train":
            chosen_fall.watch(line)
            held_alpha.watch(line)
    kernels = model.kernels(distributions=settings.needs_kl)
    announce(settings, store, loader, held_out, done, steps, device, kernels)

    def measure(step: int) -> None:
        if held_out.held_out_pairs:
            means = held_out_means(
                engine,
                encoders,
                held_out.evaluation(device, with_top=measure_top),
                settings,
                weights,
                reference,
                f"step {step}, held-out pairs",
                alpha=held_alpha.alpha,
            )
            line = {"step": step, "split": "eval"} | means
            log(line)
            best.watch(line)

    # -- the loop ----------------------------------------------------------------------------------
    if done == 0:
        sample = next(iter(loader.steps(0, 1, device, with_top=train_top)))[0]
        check_policy_is_reference(engine, encoders, store, sample, settings)
        measure(0)
    prefetched = loader.steps(done, steps, device, with_top=train_top)
    with resume_note(run.saved), progress("Training", steps, done) as bar:
        meter = StepMeter(device, prefetched)
        for step, micro_batches in enumerate(prefetched, done + 1):
            lr = learning_rate(step - 1, steps, settings)
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
                    engine,
                    (micro.pair_weights * loss).sum() * loader.world,
                    number == len(micro_batches),
                )
                means.add(metrics | {"tokens": micro.tokens}, micro.pair_weights, micro.pairs)
                bar.advance(1 / len(micro_batches))
            # Before the optimiser steps, which it must not do with non-finite values.
            line = shares_of_groups(means.result(f"step {step}"))
            norm = take_step(engine, lr, step)
            pairs = loader.size(step - 1)
            tokens = line["tokens"] * pairs
            line |= meter.step(tokens) | {"gradient_norm": norm, "lr": lr}
            if settings.hold is not None:
                line["alpha"] = held_alpha.alpha
            log({"step": step, "split": "train"} | line)
            held_alpha.update(line)
            chosen_fall.watch(line)
            bar.advance(0, pairs=pairs, tokens=tokens)
            bar.show(values_to_show(line))
            if step == steps or (settings.eval_every and step % settings.eval_every == 0):
                measure(step)
            complete = step == steps or best.exhausted
            stopped = not complete and limit.over()
            if not complete and (stopped or step == best.step or step % settings.save_every == 0):
                may_write()
                save_checkpoint(
                    engine,
                    run.checkpoints,
                    step,
                    held_alpha.alpha,
                    settings.keep_checkpoints,
                    best.step,
                )
            if stopped or complete:
                break
            meter.restart()
    if stopped:
        say(f"ended by --max-minutes at step {step} of {steps}; the same command goes on")
        return None
    held_alpha.warn_if_missed()

    # -- the result -----------------------------------------------------------------------------
    if best.step and best.step != step:
        load_from(engine, checkpoint_of(run.checkpoints, best.step))
    state = gather_weights(engine)
    may_write()
    if state is not None:
        card = model_card(run.folder, settings, store, run.folder.resolve().name, str(run.final))
        run.save_model(model, state, tokenizer, card)
        say(f"the trained model is in {run.final}" + (f": {best}" if best.step else ""))
    torch.distributed.barrier()
    return run.final
