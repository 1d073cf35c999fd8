"""The frozen reference and its SAEs on one device, which score the blocks of a store.

`fpo cache` has one in its own process, or one in each of Ray's workers (on_ray.py).
"""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, Self

import torch

from fpocli.caching.score_block import ScoredBlock, score_block
from fpocli.config import CacheConfig
from fpocli.features.encoder import SparseEncoder
from fpocli.features.site import Site
from fpocli.model.language_model import load_model
from fpocli.model.network import choose_device, read_config
from fpocli.model.packing import default_packed_length
from fpocli.scoring.saes import is_sae_of, load_saes
from fpocli.scoring.startup_check import check_against_transformers
from fpocli.store.distribution_rows import Distributions
from fpocli.store.records import TokenPairs
from fpocli.system.bar import Bar
from fpocli.system.errors import UserError
from fpocli.system.model_folder import ModelFolder, find_model


class BlockScorer:
    """Loads the reference.

    Args:
        config: the settings, with the SAEs named.
        meta: attributes of the store.
        folder: of the reference.
        encoders: the SAE of each site, on the device.
        device: where the reference runs.

    Raises:
        UserError: the reference cannot be loaded, or has another vocabulary than the store.
    """

    def __init__(
        self,
        config: CacheConfig,
        meta: dict[str, Any],
        folder: ModelFolder,
        encoders: dict[str, SparseEncoder],
        device: torch.device,
    ) -> None:
        self._config, self._meta, self._encoders, self._device = config, meta, encoders, device
        self._packed_length = config.packed_length or default_packed_length(device)
        sites = [Site.parse(name) for name in meta["sites"]]
        folder = replace(folder, load_in_4bit=config.load_in_4bit)
        self._model = load_model(folder, sites, getattr(torch, config.dtype), device).eval()
        if distributions := Distributions.of(meta):
            self._model.require_vocabulary(distributions.vocabulary)

    @classmethod
    def on_worker(cls, config: CacheConfig, meta: dict[str, Any]) -> Self:
        """The same in a process that knows nothing yet, perhaps on another host.

        Args:
            config, meta: see above.

        Raises:
            UserError: also if the files of the model or of an SAE are not those of the store.
        """
        device = choose_device(config.device)
        about, trust = meta["model"], config.trust_remote_code
        folder = find_model(config.model, revision=about["revision"], trust_remote_code=trust)
        sites = [Site.parse(name) for name in meta["sites"]]
        width = read_config(folder).hidden_size
        encoders = load_saes(list(config.sae), sites, width, device)
        same = {config.model: folder.weights_hash() == about["hash"]}
        for source, (site, encoder) in zip(config.sae, encoders.items(), strict=True):
            same[source] = is_sae_of(meta, site, encoder)
        for source, is_same in same.items():
            if not is_same:
                raise UserError(
                    f"{source} is not the same on all hosts", "copy it to all of them again"
                )
        return cls(config, meta, folder, encoders, device)

    def check(self, tokens: TokenPairs) -> str:
        """Compare the reference with plain transformers on one of these pairs; what runs, in words.

        Raises:
            UserError: they differ by more than rounding.
        """
        found = check_against_transformers(self._model, tokens)
        kernels = self._model.kernels(distributions="distributions" in self._meta)
        return (
            f"sequences of {self._packed_length:,} tokens on {self._device}; {kernels}; "
            f"within {found.nats:.1g} nats per token of transformers' eager attention"
        )

    def score(self, tokens: TokenPairs, bar: Bar, left_out: Collection[int] = ()) -> ScoredBlock:
        """The reference values of a block; the arguments are those of `score_block`."""
        return score_block(
            self._model,
            self._encoders,
            self._meta,
            tokens,
            self._packed_length,
            bar,
            drop_non_finite=self._config.drop_non_finite,
            left_out=left_out,
        )
