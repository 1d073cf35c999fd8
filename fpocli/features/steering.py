"""Steering: hidden states with features added or ablated, through the SAE's decoder.

Shapes: d model width, m features, A added features, B ablated ones.
"""

import torch
from torch import Tensor

from fpocli.features.encoder import SparseEncoder
from fpocli.system.errors import UserError


class Steering:
    """Changes hidden states as if features had other activations.

    With c = encode(h), and c' the same with values added to some features and others set to 0,

        h' = h + decode(c') - decode(c)

    so what the SAE does not reconstruct stays as it is. decode is affine at every position: the
    rows of W_dec, a bias that cancels, and for some SAEs the inverse of the normalisation that
    encode applied to h. So the difference needs no feature but the A + B that change, and no row of
    W_dec but theirs, instead of two products with all m rows.

    Args:
        encoder: the SAE's encoder.
        decoder: its W_dec, [m, d], of `load_sae`.
        add: the value that is added to a feature's activation, by feature; at every position, also
            where the feature is not active.
        ablate: features that are set to 0, none of them in `add`.

    Raises:
        UserError: the SAE has no such feature.
    """

    def __init__(
        self, encoder: SparseEncoder, decoder: Tensor, add: dict[int, float], ablate: list[int]
    ) -> None:
        for feature in (*add, *ablate):
            if not 0 <= feature < encoder.features:
                raise UserError(
                    f"the SAE has no feature {feature}",
                    f"its features are 0 to {encoder.features - 1}",
                )
        self.encoder = encoder
        device = decoder.device
        values = torch.tensor(list(add.values()), dtype=torch.float32, device=device)
        rows = decoder[torch.tensor(list(add), dtype=torch.long, device=device)]
        self._added = values @ rows
        self._ablated = torch.tensor(ablate, dtype=torch.long, device=device)
        self._ablated_rows = decoder[self._ablated]

    @torch.no_grad()
    def __call__(self, states: Tensor) -> Tensor:
        """The changed hidden states.

        Args:
            states: [..., d], of any floating dtype; the computation is in float32.

        Returns:
            [..., d] of the same dtype.

        Raises:
            UserError: they are not finite.
        """
        exact = states.float().reshape(-1, states.shape[-1])
        change = self._added.expand_as(exact)
        if len(self._ablated):
            change = change - self.encoder.selected(exact, self._ablated) @ self._ablated_rows
        changed = (exact + self._denormalised(change, exact)).to(states.dtype)
        if not changed.isfinite().all():
            raise UserError(
                "the steered hidden states are not finite", "use a value nearer to 0 with --add"
            )
        return changed.view_as(states)

    def _denormalised(self, change: Tensor, states: Tensor) -> Tensor:
        """A change [n, d] of the SAE's normalised output as a change of the states."""
        sae = self.encoder.sae
        # sae-lens keeps the mean and norm of what it encoded last, and drops them when it decodes.
        sae.process_sae_in(states)
        with_change, without = sae.run_time_activation_norm_fn_out(
            torch.stack((change, torch.zeros_like(change)))
        )
        return with_change - without
