"""fpo train --router-aux-loss: against a naive loop in plain PyTorch, and against itself."""

import json
import shutil

import experts
import families
import numpy as np
import peft
import pytest
import tiny
import torch
from runs import command, finish, finish_all, read, run, same
from stores import cache_config, contents, make_loader, write_pairs

from fpocli import TrainConfig, UserError, cache
from fpocli.store.reader import Store

# PEFT asks transformers by an old name whether activations are recomputed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

# Each pair in a packed sequence by itself, so that ranks make no difference.
ALONE = {"method": "dpo_norm", "router_aux_loss": 0.5, "packed_length": 1}
LORA = {"lora_rank": 3, "lora_target": "q_proj", "lr": 1e-2}
# Also of parameters that DeepSpeed would keep whole, as all are here.
PARTITION = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A tiny Qwen3-MoE, 21 pairs and their store, without features."""
    folder = tmp_path_factory.mktemp("mixture")
    families.network("qwen3_moe").save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", 21)
    cache(cache_config(folder, folder / "ref.zarr", layer=[], sae=[]))
    return folder


@pytest.fixture(scope="module")
def alone(mixture, tmp_path_factory):
    """A float32 run, ZeRO 2, one process."""
    return run(mixture, tmp_path_factory.mktemp("alone") / "run", "--no-bf16", **ALONE)


def expect(lines, folder, network, lr: float, steps: int, packed_length: int) -> list[list[int]]:
    """Assert that the first steps of a run are those of plain transformers and torch's AdamW, and
    return how many pairs their packed sequences have."""
    sizes = []
    store = Store.open(folder / "ref.zarr")
    loader, arrays = make_loader(store, packed_length=packed_length), contents(folder / "ref.zarr")
    ids = torch.from_numpy(arrays["tokens"].astype(np.int64))
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0)

    def preference(pair: int) -> torch.Tensor:
        begin, chosen, rejected, end = arrays["spans"][pair].tolist()
        averages = []
        for first, last in ((chosen, rejected), (rejected, end)):
            sequence = torch.cat([ids[begin:chosen], ids[first:last]])[None]
            logp = network(input_ids=sequence, use_cache=False).logits.log_softmax(-1)
            logp = logp[0, chosen - begin - 1 : -1]
            averages.append(logp.gather(-1, sequence[0, chosen - begin :, None]).mean())
        u = 0.1 * (averages[0] - averages[1] - arrays["ref/margin"][pair])
        return -torch.nn.functional.logsigmoid(u)

    def routed(pair: int) -> list[torch.Tensor]:
        begin, chosen, rejected, end = arrays["spans"][pair].tolist()
        return experts.router_logits(
            network, ids[begin:chosen], ids[chosen:rejected], ids[rejected:end]
        )

    for line, packed in zip(lines, loader.steps(0, steps, torch.device("cpu")), strict=True):
        groups = [micro.pairs.tolist() for micro in packed]
        sizes.append([len(group) for group in groups])
        pairs = sum(map(len, groups))
        uneven = sum(
            len(group) / pairs * experts.aux_loss([routed(pair) for pair in group])
            for group in groups
        )
        loss = sum(preference(pair) for group in groups for pair in group) / pairs + 0.5 * uneven
        assert line["router_aux_loss"] == pytest.approx(uneven.item(), rel=2e-5)
        assert line["loss"] == pytest.approx(loss.item(), rel=2e-5)
        optimizer.zero_grad()
        loss.backward()
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        assert line["gradient_norm"] == pytest.approx(norm.item(), rel=2e-3)
        optimizer.step()
    return sizes


def test_each_pair_alone_equals_a_naive_loop(alone, mixture):
    expect(alone[1:-1], mixture, families.network("qwen3_moe"), 1e-3, 5, 1)
    assert alone[-1]["router_aux_loss"] < alone[0]["router_aux_loss"] - 0.02, "the load evens out"
    assert alone[0]["loss"] == pytest.approx(np.log(2) + 0.5 * alone[0]["router_aux_loss"])


def test_a_step_is_the_mean_of_packed_sequences_by_their_pairs(mixture, tmp_path):
    settings = ALONE | {"packed_length": 350, "max_steps": 3}
    lines = run(mixture, tmp_path / "run", "--no-bf16", **settings)
    sizes = expect(lines[1:-1], mixture, families.network("qwen3_moe"), 1e-3, 3, 350)
    assert sizes == [[4], [2, 2], [3, 1]]


def test_with_an_adapter_it_equals_a_naive_loop_with_peft(mixture, tmp_path):
    """The router itself is frozen; what the adapter changes is its input."""
    lines = run(mixture, tmp_path / "run", "--no-bf16", **ALONE, **LORA, max_steps=2)
    network = families.network("qwen3_moe")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"])
    peft.get_peft_model(network, config)
    expect(lines[1:-1], mixture, network, 1e-2, 2, 1)


@pytest.mark.parametrize(
    ("zero", "processes"),
    [(3, 2), (0, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, 2), (3, 1)])],
)
def test_same_curve_for_every_zero_stage_and_number_of_processes(
    alone, mixture, tmp_path, zero, processes
):
    (tmp_path / "deepspeed.json").write_text(json.dumps(PARTITION if zero == 3 else {}))
    settings = ALONE | {"zero": zero, "deepspeed": tmp_path / "deepspeed.json"}
    words = command(mixture, tmp_path / "run", "--no-bf16", **settings)
    for done in finish_all(words, processes):
        assert done.returncode == 0, done.stderr[-3000:]
    same(read(tmp_path / "run"), alone, 5e-5)


def test_a_run_is_resumed(alone, mixture, tmp_path):
    out, settings = tmp_path / "run", ALONE | {"save_every": 2}
    run(mixture, out, "--no-bf16", **settings)
    shutil.rmtree(out / "final")
    same(run(mixture, out, "--no-bf16", **settings), alone, 1e-6)
    done = finish(command(mixture, out, "--no-bf16", **settings | {"router_aux_loss": 0.1}))
    assert done.returncode == 2 and "router_aux_loss" in done.stderr


def test_a_model_without_routers_is_refused(material, store_path, tmp_path):
    done = finish(command(material, tmp_path / "run", router_aux_loss=0.001))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "Gemma2ForCausalLM has no routers" in done.stderr and "leave it out" in done.stderr
    with pytest.raises(UserError, match=r"--router-aux-loss -1\.0 is out of range"):
        TrainConfig(cache="unused", router_aux_loss=-1)
