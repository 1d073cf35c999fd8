"""Non-finite values: no step is taken with them, at any ZeRO stage and in either dtype."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import read

from fpocli.training.checkpoints import newest_checkpoint

SCRIPT = """
import sys, torch
from collections.abc import Iterable
from pathlib import Path
from fpocli import TrainConfig, UserError, train
from fpocli.training import train as training

out, store, stages, spoiled = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
make_engine, take_step, backward = training.make_engine, training.take_step, training.backward


def tensors(value):
    if torch.is_tensor(value):
        return [value.detach().clone()]
    if isinstance(value, dict):
        value = value.values()
    inside = value if isinstance(value, Iterable) and not isinstance(value, str) else ()
    return [tensor for item in inside for tensor in tensors(item)]


def everything(engine):
    # Weights and the optimiser's state, float32 master weights included.
    weights = [getattr(p, "ds_tensor", p) for p in engine.module.parameters()]
    return tensors(weights), tensors(engine.optimizer.state_dict())


def same(one, other):
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in zip(one, other))


def broken(model, settings, config):
    engine = make_engine(model, settings, config)

    def spoil(module, inputs, output):
        if torch.distributed.get_rank() != spoiled:
            return
        third, last = engine.global_steps == 2, engine.global_steps == 5
        # Where layers are recomputed, both times.
        if (third and case == "activation") or (last and case == "held-out"):
            return output * torch.inf
        if third and case == "gradient" and output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.nan)

    model.network.model.layers[2].mlp.register_forward_hook(spoil)
    engines.append(engine)
    return engine


def watched(engine, lr, step):
    states[step] = everything(engine)
    norm = take_step(engine, lr, step)
    states[step + 1] = everything(engine)
    return norm


def flat(engine, loss, last):
    backward(engine, loss * (case != "zero"), last)


training.make_engine, training.take_step, training.backward = broken, watched, flat
for zero in map(int, stages):
    for dtype in ("float32", "bfloat16"):
        for case in ("gradient", "activation", "held-out", "zero")[: 3 if zero else 4]:
            engines, states = [], {}
            name = f"{zero}-{dtype}-{case}"
            settings = TrainConfig(
                cache=store, out=str(out / name), batch_size=4, packed_length=300, lr=1e-3,
                warmup=0, eval_fraction=0.2, device="cpu", zero=zero, bf16=dtype == "bfloat16",
                allow=["dtype"], save_every=1,
            )
            try:
                train(settings)
                said = "the end"
            except UserError as error:
                said = str(error)
            except SystemExit as error:
                said = f"exit {error}"
            if case == "held-out":
                assert len(states) == 6
            elif case == "zero":
                weights = [(state[0],) for state in states.values()]
                assert len(weights) == 6 and all(same(weights[0], other) for other in weights)
            else:
                assert list(states) == [1, 2, 3] and not same(states[1], states[2])
                assert same(everything(engines[0]), states[3]), "the third step changed something"
            print(f"{name}: {said}", flush=True)
"""


def spoil(out: Path, store: Path, stages: str, world: int = 1) -> list[list[str]]:
    """What the processes print; the last process has a non-finite value."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    words = [sys.executable, "-c", SCRIPT, str(out), str(store), stages, str(world - 1)]
    started = [
        subprocess.Popen(
            words,
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate() for process in started]
    for process, (_, stderr) in zip(started, outputs, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    return [stdout.splitlines() for stdout, _ in outputs]


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
        assert newest == "step-2" and not (out / name / "final").exists()
        if name.endswith("gradient"):
            assert said.startswith("step 3: the gradient is non-finite")
        else:
            assert said.startswith("step 3: loss is nan, from the pairs ")


@pytest.mark.parametrize("stages", ["0", "2", pytest.param("13", marks=pytest.mark.long)])
def test_no_weights_are_updated_with_non_finite_values(store_path, tmp_path, stages):
    """Weights and optimiser are unchanged to the bit; a gradient of 0 is a normal step."""
    (lines,) = spoil(tmp_path, store_path, stages)
    assert len(lines) == {"0": 8, "2": 6, "13": 12}[stages]
    check(tmp_path, lines)


def test_all_ranks_stop_and_one_reports_why(store_path, tmp_path):
    first, second = spoil(tmp_path, store_path, "2", world=2)
    check(tmp_path, first)
    assert len(first) == 6 and all(line.endswith("exit 2") for line in second)
