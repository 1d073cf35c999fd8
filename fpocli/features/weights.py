"""Per-feature weights omega of the distance D (paper, section 5.3), read from a file.

    layer_25.resid_post:
      default: 1.0
      1041: 0.0        # this feature is free to change
      77: 5.0

Shapes: m features of a site.
"""

from typing import Any

import torch
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_yaml


def load_feature_weights(path: str, sites: dict[str, dict[str, Any]]) -> dict[str, Tensor]:
    """The weights in a YAML or JSON file.

    Args:
        path: the file: for each site a default and values by feature index. A missing site or
            default means 1.
        sites: the store's sites, as in its metadata.

    Returns:
        float32 [m] for each site in the file.

    Raises:
        UserError: the file cannot be read, names a site or feature that the store does not have,
            or a weight is not a finite number of at least 0.
    """
    content = read_yaml(path)
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(
            f"{path} does not hold weights by site",
            f"write '{next(iter(sites))}:' and below it 'default: 1.0' and 'INDEX: WEIGHT'",
        )
    weights = {}
    for site, values in content.items():
        if site not in sites:
            raise UserError(
                f"{path} has weights for {site}, which is not a site of the store",
                f"its sites are {', '.join(sites)}",
            )
        m = sites[site]["d_sae"]
        weights[site] = torch.full((m,), _number(path, site, "default", values.get("default", 1)))
        for name, value in values.items():
            if name != "default":
                weights[site][_index(path, site, name, m)] = _number(path, site, name, value)
    return weights


def _index(path: str, site: str, name: Any, m: int) -> int:
    # Keys of a JSON object are strings.
    text = str(name)
    if isinstance(name, bool) or not (text.isascii() and text.isdecimal()) or int(text) >= m:
        raise UserError(
            f"{path} has a weight for feature {name} of {site}, which does not exist",
            f"its features are 0 to {m - 1}",
        )
    return int(text)


def _number(path: str, site: str, name: Any, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Written so that nan fails the comparison.
    if not number or not 0 <= value <= torch.finfo(torch.float32).max:
        raise UserError(
            f"{path} has the weight {value} for {name} of {site}",
            "a weight is a finite float32 number of at least 0",
        )
    return float(value)
