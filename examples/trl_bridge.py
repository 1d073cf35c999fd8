"""fpo's method in TRL's DPO trainer, from a store. The settings are TRL's:

    fpo cache --model MODEL --layer 24 --sae SAE --data pairs.jsonl --out ref.zarr
    python examples/trl_bridge.py --cache ref.zarr --model MODEL --output_dir run --max_length 2048
    accelerate launch --num_processes 2 examples/trl_bridge.py ...

Without `constraint=` it is DPO from the store.
"""

from dataclasses import dataclass, field

from trl import DPOConfig, TrlParser

from fpocli.trl import FeatureConstraint, FPOTrainer, store_dataset


@dataclass
class Arguments:
    """What is not TRL's."""

    cache: str = field(metadata={"help": "The store."})
    model: str = field(metadata={"help": "The policy's starting weights: the store's model."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the constraint."})
    k: int = field(default=50, metadata={"help": "Top features that the constraint compares."})


def main() -> None:
    """Train and save the model."""
    parser = TrlParser((Arguments, DPOConfig))
    parser.set_defaults(loss_type=["sigmoid_norm"], logging_steps=1)
    arguments, settings = parser.parse_args_and_config()
    trainer = FPOTrainer(
        model=arguments.model,
        args=settings,
        train_dataset=store_dataset(arguments.cache),
        constraint=FeatureConstraint(arguments.cache, alpha=arguments.alpha, k=arguments.k),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
