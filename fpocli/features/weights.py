"""Per-feature weights omega of the distance D (paper, section 5.3), read from a file.

    layer_25.resid_post:
      default: 1.0
      1041: 0.0        # this feature is free to move
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
        path: the file: by site a default and values by feature index. A site, or a default, that
            is not there means 1.
        sites: the store's, as its metadata describe them.

    Returns:
        float32 [m] for each site in the file.

    Raises:
        UserError: the file cannot be read, or names a site or feature that is not there, or a
            weight is no finite number from 0 up.
    """
    given = read_yaml(path)
    if not isinstance(given, dict) or not all(isinstance(v, dict) for v in given.values()):
        raise UserError(
            f"{path} does not give weights by site",
            f"write '{next(iter(sites))}:' and below it 'default: 1.0' and 'INDEX: WEIGHT'",
        )
    weights = {}
    for site, values in given.items():
        if site not in sites:
            raise UserError(
                f"{path} weighs features at {site}, where the store has none",
                f"its sites are {', '.join(sites)}",
            )
        m = sites[site]["d_sae"]
        weights[site] = torch.full((m,), _number(path, site, "default", values.get("default", 1)))
        for name, value in values.items():
            if name != "default":
                weights[site][_index(path, site, name, m)] = _number(path, site, name, value)
    return weights


def _index(path: str, site: str, name: Any, m: int) -> int:
    # JSON writes the names of an object as text.
    text = str(name)
    if isinstance(name, bool) or not (text.isascii() and text.isdecimal()) or int(text) >= m:
        raise UserError(
            f"{path} weighs the feature {name} at {site}", f"its features are 0 to {m - 1}"
        )
    return int(text)


def _number(path: str, site: str, name: Any, value: Any) -> float:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Written so that nan is out of the range.
    if not number or not 0 <= value <= torch.finfo(torch.float32).max:
        raise UserError(
            f"{path} gives {name} at {site} the weight {value}",
            "a weight is a finite number from 0 up, in float32",
        )
    return float(value)
