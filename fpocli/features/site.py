"""A site: where in the network a hidden state is taken and an SAE reads."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """Where a hidden state is taken.

    Args:
        layer: decoder layer, from 0.
        kind: resid_post, the layer's output before any final norm; or mlp_out, the MLP's
            contribution as it is added to the residual stream.
    """

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"layer_{self.layer}.{self.kind}"

    @classmethod
    def parse(cls, name: str) -> "Site":
        """The site of a name such as layer_25.resid_post."""
        match = re.fullmatch(r"layer_(\d+)\.(resid_post|mlp_out)", name)
        if match is None:
            raise ValueError(f"{name} is not a site's name")
        return cls(int(match[1]), match[2])
