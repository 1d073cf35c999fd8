"""A store in TRL: its pairs as a data set, and the feature constraint in a trainer.

    from fpocli.trl import FeatureConstraint, FPOTrainer, store_dataset

The only room that imports trl, with the extra `trl`; nothing of fpo imports it.
"""

from fpocli.trl.constraint import FeatureConstraint
from fpocli.trl.dataset import store_dataset
from fpocli.trl.trainer import FPOTrainer

__all__ = ["FPOTrainer", "FeatureConstraint", "store_dataset"]
