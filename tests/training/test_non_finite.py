"""Non-finite values: no step is taken with them, at any ZeRO stage and in either dtype."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import pytest
import torch
from processes import results, together
from runs import read

from fpocli import TrainConfig, UserError, train
from fpocli.training import train as training
from fpocli.training.checkpoints import newest_checkpoint


def tensors(value: object) -> list[torch.Tensor]:
    """Copies of all tensors inside."""
    if torch.is_tensor(value):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = value.values()
    inside = value if isinstance(value, Iterable) and not isinstance(value, str) else ()
    return [tensor for item in inside for tensor in tensors(item)]


def everything(engine) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights and the optimiser's state, float32 master weights included."""
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return tensors(weights), tensors(engine.optimizer.state_dict())


def same(one, other) -> bool:
    pairs = zip(one, other, strict=True)
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


class Spoiled:
    """Training with a non-finite value in one process: in the third step's gradient or activation,
    or in the held-out pairs at the end; or with a loss of zero. Use it once, in a process of its
    own."""

    def __init__(self, case: str, rank: int) -> None:
        self.case, self.rank = case, rank
        self.engines, self.states = [], {}
        self._make_engine, self._take_step = training.make_engine, training.take_step
        self._backward = training.backward

    def __enter__(self) -> "Spoiled":
        training.make_engine, training.take_step = self.make_engine, self.take_step
        training.backward = self.backward
        return self

    def __exit__(self, *error) -> None:
        training.make_engine, training.take_step = self._make_engine, self._take_step
        training.backward = self._backward

    def make_engine(self, model, settings, config):
        engine = self._make_engine(model, settings, config)
        self.engines.append(engine)
        model.network.model.layers[2].mlp.register_forward_hook(self.spoil)
        return engine

    def spoil(self, module, inputs, output):
        if torch.distributed.get_rank() != self.rank:
            return None
        third, last = (self.engines[0].global_steps == steps for steps in (2, 5))
        # Where layers are recomputed, both times.
        if (third and self.case == "activation") or (last and self.case == "held-out"):
            return output * torch.inf
        if third and self.case == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)
        return None

    def take_step(self, engine, lr, step):
        self.states[step] = everything(engine)
        norm = self._take_step(engine, lr, step)
        self.states[step + 1] = everything(engine)
        return norm

    def backward(self, engine, loss, last):
        self._backward(engine, loss * (self.case != "zero"), last)


def train_spoiled(out: Path, store: Path, stages: str, rank: int) -> None:
    """Train at each stage in each dtype with each case; print how each training ended."""
    cases = [
        (zero, dtype, case)
        for zero in map(int, stages)
        for dtype in ("float32", "bfloat16")
        for case in ("gradient", "activation", "held-out", "zero")[: 3 if zero else 4]
    ]
    for zero, dtype, case in cases:
        name = f"{zero}-{dtype}-{case}"
        settings = TrainConfig(
            cache=str(store), out=str(out / name), batch_size=4, packed_length=300, lr=1e-3,
            warmup=0, eval_fraction=0.2, device="cpu", zero=zero, bf16=dtype == "bfloat16",
            allow=["dtype"], save_every=1,
        )  # fmt: skip
        with Spoiled(case, rank) as spoiled:
            try:
                train(settings)
                said = "the end"
            except UserError as error:
                said = str(error)
            except SystemExit as error:
                said = f"exit {error}"
        states = spoiled.states
        if case == "held-out":
            assert len(states) == 6
        elif case == "zero":
            weights = [(state[0],) for state in states.values()]
            assert len(weights) == 6 and all(same(weights[0], other) for other in weights)
        else:
            assert list(states) == [1, 2, 3] and not same(states[1], states[2])
            unchanged = same(everything(spoiled.engines[0]), states[3])
            assert unchanged, "the third step changed something"
        print(f"{name}: {said}", flush=True)


def spoil(out: Path, store: Path, stages: str, world: int = 1) -> list[list[str]]:
    """What the processes print; the last process has a non-finite value."""
    main = partial(train_spoiled, out, store, stages, world - 1)
    processes = results(*together([], world, main=main))
    for done in processes:
        assert done.returncode == 0, done.stderr[-3000:]
    return [done.stdout.splitlines() for done in processes]


def check(out: Path, lines: list[str]) -> None:
    for line in lines:
        name, said = line.split(": ", 1)
        lines = read(out / name)
        if name.endswith("zero"):
            assert said == "the end" and len(lines) == 7
            continue
        if name.endswith("held-out"):
            assert said.startswith("step 5, held-out pairs: loss is nan, from the pairs ")
            assert lines[-1]["split"] == "train"
            continue
        assert lines[-1]["step"] == 2, "no line of the third step"
        newest = newest_checkpoint(out / name / "checkpoints")
        assert newest.name == "step-2" and not (out / name / "final").exists()
        if name.endswith("gradient"):
            assert said.startswith("step 3: the gradient is non-finite")
        else:
            assert said.startswith("step 3: loss is nan, from the pairs ")


@pytest.mark.parametrize("stages", ["0", "2", pytest.param("13", marks=pytest.mark.slow)])
def test_no_weights_are_updated_with_non_finite_values(store_path, tmp_path, stages):
    """Weights and optimiser are unchanged to the bit; a gradient of 0 is a normal step."""
    (lines,) = spoil(tmp_path, store_path, stages)
    assert len(lines) == {"0": 8, "2": 6, "13": 12}[stages]
    check(tmp_path, lines)


@pytest.mark.slow
def test_all_ranks_stop_and_one_reports_why(store_path, tmp_path):
    first, second = spoil(tmp_path, store_path, "2", world=2)
    check(tmp_path, first)
    assert len(first) == 6 and all(line.endswith("exit 2") for line in second)
