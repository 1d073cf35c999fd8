"""The feature constraint for a model that another trainer runs on padded batches.

Shapes: P pairs of a batch, M scored tokens; column 0 is chosen, column 1 rejected.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fpocli.config import LOGITS, TrainConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.features.weights import FeatureWeights, load_feature_weights
from fpocli.model.language_model import ModelOutput
from fpocli.model.network import check_layers
from fpocli.scoring.loading import sites_of
from fpocli.scoring.saes import load_encoders
from fpocli.scoring.score import reduce_to_pairs
from fpocli.store.local_cache import locally_cached
from fpocli.store.reader import Store
from fpocli.store.records import ReferenceValues
from fpocli.system.errors import UserError
from fpocli.training.first_step import check_store_serves
from fpocli.training.losses import constraint_delta
from fpocli.training.micro_batch import reference_tensors
from fpocli.training.objective import compare_features

# The settings of fpo train that are those of the constraint.
_SETTINGS = ("alpha", "k", "at", "sae", "stop_gradient", "feature_weights")
# Blocks of the store are kept in memory up to so many bytes: a trainer draws pairs from everywhere.
_MEMORY = 2**31


class Compared(NamedTuple):
    """What the constraint makes of P pairs; the first three have a gradient.

    Args:
        delta: float32 [P].
        distance: D, float32 [P, 2].
        logp: S of the policy, float32 [P, 2], nats.
        ref_logp: S_ref of the store, float32 [P, 2], nats.
    """

    delta: Tensor
    distance: Tensor
    logp: Tensor
    ref_logp: Tensor


class FeatureConstraint:
    """delta = alpha beta (D_l - sg D_w) of a batch, against the features in a store (paper,
    equation 11); D is that of `fpo train`, and beta the trainer's.

    Args:
        cache: the store, a folder or a URL.
        settings: any of alpha, k, at, sae, stop_gradient and feature_weights, as the flags of
            `fpo train`, with their defaults; of feature_weights a file only.

    Raises:
        UserError: the store is not complete, has no features, or too few of them; or a setting is
            wrong.
    """

    def __init__(self, cache: str, **settings: Any) -> None:
        unknown = sorted(settings.keys() - set(_SETTINGS))
        if unknown or settings.get("feature_weights") == LOGITS:
            raise UserError(
                f"{unknown[0]} is no setting of the constraint"
                if unknown
                else f"the constraint in TRL takes a file of feature_weights, not {LOGITS}",
                f"it has {', '.join(_SETTINGS)}; others are the trainer's",
            )
        self.settings = TrainConfig(cache=cache, method="fpo", **settings)
        self.store = Store.open(locally_cached(cache))
        check_store_serves(self.store, self.settings)
        self.sites = sites_of(self.store, self.settings.at)
        self._encoders: dict[str, SparseEncoder] = {}
        self._weights: dict[str, FeatureWeights] = {}
        self._block = lru_cache(maxsize=self._blocks_in_memory())(self._read_block)

    def load(self, network: Any, device: torch.device) -> None:
        """Load the SAEs for a model.

        Args:
            network: transformers' model with its head.
            device: where the hidden states are.

        Raises:
            UserError: the model is quantised and the reference was not, or the reverse; it has no
                such layer or another width; or an SAE is not found or not the store's.
        """
        if self.store.in_4bit != bool(getattr(network, "is_quantized", False)):
            there, here = ("", "not ") if self.store.in_4bit else ("not ", "")
            raise UserError(
                f"the reference of {self.store.path} was {there}run in 4 bits, and the model is "
                f"{here}loaded so",
                "load the model as the reference was, or cache again",
            )
        config = network.config.get_text_config()
        check_layers(config, self.sites)
        self._encoders = load_encoders(
            self.store, self.sites, self.settings.sae, config.hidden_size, device
        )
        if file := self.settings.feature_weights:
            weights = load_feature_weights(file, self.store.widths)
            self._weights = {
                site: weights[site].to(device) for site in self._encoders if site in weights
            }

    def compare(
        self, output: ModelOutput, counts: list[int], pairs: list[int], beta: float
    ) -> Compared:
        """The policy's features beside the store's, and delta.

        Args:
            output: the policy's, as `reduce_to_pairs` takes it.
            counts: n(y) of the 2P responses.
            pairs: the numbers of the P pairs in the store.
            beta: scale of the rewards.
        """
        if max(pairs) >= self.store.pairs or min(pairs) < 0:
            raise UserError(
                f"the batch has pair {max(pairs)}, and the constraint's store {self.store.path} "
                f"has {self.store.pairs:,}",
                "make data set and constraint from the same store",
            )
        places = [divmod(pair, self.store.block_size) for pair in pairs]
        values = [(self._block(block), row) for block, row in places]
        reference = reference_tensors(values, output.logp.device)
        scores = reduce_to_pairs(output, self._encoders, counts)
        k, stop = self.settings.k, self.settings.stop_gradient
        _, distances = compare_features(scores, reference, self._encoders, k, self._weights)
        distance = torch.stack(list(distances.values())).mean(0)
        alpha = self.settings.alpha
        delta = constraint_delta(distance, "features", alpha, beta, stop_gradient=stop)
        return Compared(delta, distance, scores.logp, reference.logp)

    def _read_block(self, block: int) -> ReferenceValues:
        reference = self.store.reference(block, self.store.tokens(block))
        features = {str(site): reference.features[str(site)] for site in self.sites}
        return ReferenceValues(reference.logp, reference.margin, features)

    def _blocks_in_memory(self) -> int:
        # An index and a value take at most 4 bytes each.
        sizes = [self.store.sites[str(site)]["k"] * 2 * 8 for site in self.sites]
        return max(1, _MEMORY // (self.store.block_size * sum(sizes)))
