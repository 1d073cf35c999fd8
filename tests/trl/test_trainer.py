"""fpocli.trl against fpo's own loss on the same pairs, and against TRL's own trainer."""

import numpy as np
import pytest
import tiny
import torch
from stores import cache_config
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import DPOConfig

from fpocli import Store, TrainConfig, UserError
from fpocli.features.site import Site
from fpocli.model.language_model import LanguageModel
from fpocli.model.packing import pack
from fpocli.scoring.saes import load_encoders
from fpocli.scoring.score import score
from fpocli.training.micro_batch import reference_tensors
from fpocli.training.objective import objective
from fpocli.trl import FeatureConstraint, FPOTrainer, store_dataset

BETA, ALPHA, K = 0.3, 0.7, 5
# The pairs of a batch, from two blocks of the store and in no order.
PAIRS = [9, 2, 20, 0, 5, 14]

# TRL still uses names that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed:FutureWarning")


@pytest.fixture(scope="module")
def dataset(store_path):
    return store_dataset(str(store_path))


def make_trainer(material, tmp_path, dataset, constraint=None, *, policy="policy", **settings):
    common = {
        "output_dir": str(tmp_path / "trl"),
        "per_device_train_batch_size": len(PAIRS),
        "loss_type": "sigmoid_norm",
        "beta": BETA,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return FPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(material / policy, dtype=torch.float32),
        args=DPOConfig(**(common | settings)),
        train_dataset=dataset,
        processing_class=tiny.tokenizer(),
        constraint=constraint,
    )


def own_loss(material, store_path, pairs, network, **settings):
    """fpo's loss of these pairs, packed, and its metrics."""
    store = Store.open(store_path)
    network = AutoModelForCausalLM.from_pretrained(material / "policy", dtype=torch.float32)
    sites = [Site.parse(name) for name in store.sites]
    policy = LanguageModel(network, sites)
    encoders = load_encoders(store, sites, [], tiny.WIDTH, torch.device("cpu"))
    places = [divmod(pair, store.block_size) for pair in pairs]
    values = [(store.reference(block, store.tokens(block)), row) for block, row in places]
    scores = score(policy, encoders, pack([store.pair(pair) for pair in pairs]))
    reference = reference_tensors(values, torch.device("cpu"))
    config = TrainConfig(cache="unused", beta=BETA, alpha=ALPHA, k=K, **settings)
    loss, metrics = objective(scores, reference, encoders, config)
    return loss.mean(), metrics, network


def test_the_data_set_is_the_store(dataset, store_path):
    store = Store.open(store_path)
    assert len(dataset) == store.pairs
    logp = store.read_array("ref/logp")
    for number, row in enumerate(dataset):
        pair = store.pair(number)
        ids = (row[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
        assert all(map(np.array_equal, ids, (pair.prompt, pair.chosen, pair.rejected)))
        assert row["pair"] == number
        assert [row["ref_chosen_logps"], row["ref_rejected_logps"]] == logp[number].tolist()


@pytest.mark.parametrize(
    ("loss_type", "method", "stop"),
    [
        ("sigmoid_norm", "fpo", True),
        ("sigmoid", "dpo+features", True),
        ("sigmoid_norm", "fpo", False),
    ],
)
def test_loss_and_gradients_are_fpos(
    material, store_path, dataset, tmp_path, loss_type, method, stop
):
    constraint = FeatureConstraint(str(store_path), alpha=ALPHA, k=K, stop_gradient=stop)
    trainer = make_trainer(material, tmp_path, dataset, constraint, loss_type=loss_type)
    rows = [dataset[pair] for pair in PAIRS]
    trainer.model.train()
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    theirs.backward()
    ours, metrics, network = own_loss(
        material, store_path, PAIRS, None, method=method, stop_gradient=stop
    )
    ours.backward()
    assert metrics["delta"].abs().min() > 1e-3
    assert theirs.item() == pytest.approx(ours.item(), abs=1e-6)
    gradients = dict(network.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        own = gradients[name].grad
        assert torch.allclose(parameter.grad, own, atol=1e-6, rtol=1e-4), name
        assert own.abs().max() > 1e-7, name
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logged["delta"] == pytest.approx(metrics["delta"].mean().item(), rel=1e-4)
    for side in ("chosen", "rejected"):
        expected = metrics[f"distance_{side}"].mean().item()
        assert logged[f"distance/{side}"] == pytest.approx(expected, rel=1e-4)


def test_logged_rewards_are_trls(material, store_path, dataset, tmp_path):
    """delta is inside the loss and not in the rewards that are logged."""
    rows = [dataset[pair] for pair in PAIRS]
    logged = []
    for constraint in (None, FeatureConstraint(str(store_path), alpha=ALPHA, k=K)):
        trainer = make_trainer(material, tmp_path, dataset, constraint)
        trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        metrics = trainer._metrics["eval"]
        logged.append({name: metrics[name] for name in metrics if "rewards" in name})
    assert logged[0].keys() == logged[1].keys() and len(logged[0]) == 4
    for name, values in logged[0].items():
        assert len(values) == 1
        assert logged[1][name] == pytest.approx(values, abs=1e-5), name


def test_without_a_constraint_it_is_trls_loss(material, store_path, dataset, tmp_path):
    """Of TRL's own trainer, by its own collator, which scores the reference itself."""
    from datasets import Dataset
    from trl import DPOTrainer

    settings = make_trainer(material, tmp_path, dataset).args

    class OnTheseTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *rest):
            return dataset

    names = ["prompt_ids", "chosen_ids", "rejected_ids"]
    plain = OnTheseTokens(
        model=AutoModelForCausalLM.from_pretrained(material / "policy", dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(material / "model", dtype=torch.float32),
        args=settings,
        train_dataset=dataset.select_columns(names),
        processing_class=tiny.tokenizer(),
    )
    assert isinstance(plain.train_dataset, Dataset)
    for pair in PAIRS:
        for side in ("chosen", "rejected"):
            name = f"ref_{side}_logps"
            assert dataset[pair][name] == pytest.approx(plain.train_dataset[pair][name], abs=1e-4)
    own = make_trainer(material, tmp_path, dataset)
    losses = [
        trainer.compute_loss(
            trainer.model, trainer.data_collator([trainer.train_dataset[p] for p in PAIRS])
        )
        for trainer in (own, plain)
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-6)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_run_starts_at_log_two_and_moves(material, store_path, dataset, tmp_path, checkpointing):
    constraint = FeatureConstraint(str(store_path), k=K)
    parts = dataset.train_test_split(0.2, seed=0)
    trainer = make_trainer(
        material,
        tmp_path,
        parts["train"],
        constraint,
        policy="model",
        learning_rate=1e-3,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=4,
        gradient_checkpointing=checkpointing,
        lr_scheduler_type="constant",
    )
    held_out = trainer.evaluate(parts["test"])
    assert held_out["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert held_out["eval_distance/rejected"] < 1e-6
    trainer.train()
    first, *_, last = (line for line in trainer.state.log_history if "loss" in line)
    assert first["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert first["distance/chosen"] < 1e-6 and abs(first["delta"]) < 1e-6
    assert last["distance/rejected"] > 1e-4 and last["rewards/margins"] > first["rewards/margins"]
    assert trainer.ref_model is None


def test_truncated_sequences_are_refused(material, dataset, tmp_path):
    with pytest.raises(UserError, match="would be truncated") as error:
        make_trainer(material, tmp_path, dataset, max_length=16)
    assert "max_length=" in error.value.hint


def test_other_data_sets_are_refused(material, dataset, tmp_path):
    with pytest.raises(UserError, match="not one of a store"):
        make_trainer(material, tmp_path, dataset.remove_columns("pair"))


def test_bfloat16_autocast_leaves_the_saes_in_float32(material, store_path, dataset, tmp_path):
    """TRL's default. D differs from float32's by rounding of the network alone."""
    constraint = FeatureConstraint(str(store_path), alpha=ALPHA, k=K)
    logged = {}
    for bf16 in (False, True):
        trainer = make_trainer(material, tmp_path, dataset, constraint, bf16=bf16)
        trainer.model = trainer.accelerator.prepare_model(trainer.model)
        trainer.model.train()
        batch = trainer.data_collator([dataset[p] for p in PAIRS])
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, batch).backward()
        logged[bf16] = trainer._metrics["train"]
    for name in ("distance/rejected", "delta", "rewards/margins"):
        one, other = (logged[bf16][name][-1] for bf16 in (False, True))
        assert one != other
        assert one == pytest.approx(other, rel=0.05, abs=0.02), name


def test_weights_of_features_and_a_named_site(material, store_path, dataset, tmp_path):
    """A weight of 0 for all features leaves nothing of delta."""
    file = tmp_path / "weights.yaml"
    file.write_text("layer_3.resid_post: {default: 0.0}")
    constraint = FeatureConstraint(
        str(store_path), k=K, at=["layer_3.resid_post"], feature_weights=str(file)
    )
    trainer = make_trainer(material, tmp_path, dataset, constraint)
    trainer.compute_loss(trainer.model, trainer.data_collator([dataset[p] for p in PAIRS]))
    assert trainer._metrics["eval"]["delta"] == [0.0]


# -- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.1}, "beta is no setting"),
        ({"alpha": -1}, "--alpha -1"),
        ({"k": 1000}, "--k 1000"),
        ({"at": ["layer_1.mlp_out"]}, "no features at layer_1.mlp_out"),
        ({"feature_weights": "logits"}, "not logits"),
    ],
)
def test_wrong_settings_of_the_constraint(store_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        FeatureConstraint(str(store_path), **settings)
    assert error.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "hinge"}, "not defined for the loss_type hinge"),
        ({"loss_type": ["sigmoid", "sigmoid_norm"]}, "sigmoid, sigmoid_norm"),
        ({"f_divergence_type": "forward_kl"}, "forward_kl"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"beta": 0.0}, "beta is 0.0"),
    ],
)
def test_wrong_settings_of_trl(material, store_path, dataset, tmp_path, settings, message):
    with pytest.raises(UserError, match=message) as error:
        make_trainer(material, tmp_path, dataset, FeatureConstraint(str(store_path)), **settings)
    assert error.value.hint


def test_a_data_set_of_another_store_is_refused(material, store_path, dataset, tmp_path):
    from fpocli import cache

    other = tmp_path / "other.zarr"
    cache(cache_config(material, other, model=str(material / "policy")))
    trainer = make_trainer(material, tmp_path, dataset, FeatureConstraint(str(other), k=K))
    batch = trainer.data_collator([dataset[p] for p in PAIRS])
    with pytest.raises(UserError, match="not those of the constraint's store"):
        trainer.compute_loss(trainer.model, batch)


def test_a_data_set_of_a_larger_store_is_refused(material, dataset, tmp_path):
    from fpocli import cache

    other = tmp_path / "other.zarr"
    cache(cache_config(material, other, limit=9))
    trainer = make_trainer(material, tmp_path, dataset, FeatureConstraint(str(other), k=K))
    batch = trainer.data_collator([dataset[p] for p in PAIRS])
    with pytest.raises(UserError, match="the batch has pair 20, and the constraint's store"):
        trainer.compute_loss(trainer.model, batch)


def test_a_store_without_features_has_no_constraint(material, tmp_path):
    from fpocli import cache

    path = tmp_path / "plain.zarr"
    cache(cache_config(material, path, layer=[], sae=[]))
    with pytest.raises(UserError, match=r"plain\.zarr has none"):
        FeatureConstraint(str(path))
    assert len(store_dataset(str(path))) == 21


def test_a_model_in_4_bits_needs_such_a_store(material, store_path, dataset, tmp_path):
    constraint = FeatureConstraint(str(store_path), k=K)
    network = AutoModelForCausalLM.from_pretrained(
        material / "policy", quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    )
    with pytest.raises(UserError, match="was not run in 4 bits, and the model is loaded so"):
        constraint.load(network, torch.device("cpu"))


def test_an_incomplete_or_missing_store_is_refused(material, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        store_dataset(str(tmp_path / "none.zarr"))


def test_reentrant_checkpointing_is_refused_at_a_site_inside_a_layer(material, dataset, tmp_path):
    """There the forward pass has no graph, so D would have no gradient."""
    from fpocli import cache

    path = tmp_path / "mlp.zarr"
    cache(cache_config(material, path, site=["mlp_out"]))
    for reentrant in (False, True):
        trainer = make_trainer(
            material,
            tmp_path,
            dataset,
            FeatureConstraint(str(path), k=K),
            max_steps=1,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )
        if reentrant:
            with pytest.raises(UserError, match="no gradient") as error:
                trainer.train()
            assert "use_reentrant" in error.value.hint
        else:
            trainer.train()


def test_another_version_of_trl_is_refused(material, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("trl.__version__", "1.17.0")
    with pytest.raises(UserError, match=r"made for TRL 1\.16, and this is 1\.17\.0"):
        make_trainer(material, tmp_path, dataset)
