"""Weights of single features in the distance D (paper, section 5.3), read from a file.

    layer_25.resid_post:
      default: 1.0
      1041: 0.0                              # this feature is free to change
      77: {weight: 5.0, direction: up}       # this one is held, but may fall
      groups:
        french: [90, 1041]                   # a name for some features: their distance is logged
        json: {features: [3, 12], weight: 5.0}

Shapes: m features of a site, F named features.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fpocli.system.errors import UserError
from fpocli.system.json_yaml import read_yaml

# The name of a group becomes a part of a metric's.
GROUP_NAME = re.compile(r"[\w-]+")
# What a direction penalises: any change, a rise above the reference, a fall below it.
_DIRECTIONS = {"both": 0, "up": 1, "down": -1}
_NAMES = {number: name for name, number in _DIRECTIONS.items()}


@dataclass(frozen=True)
class FeatureWeights:
    """The weights of a site's features in D.

    Args:
        weight: omega, float32 [m].
        direction: int8 [m]: 0 penalises any change, 1 a value above the reference's, -1 one below.
        named: int64 [F], the features that the file names, rising. They are compared in every
            response.
        groups: features by the name of their group, int64, rising.
    """

    weight: Tensor
    direction: Tensor
    named: Tensor
    groups: dict[str, Tensor]

    def to(self, device: torch.device) -> Self:
        """The same weights on another device."""
        return type(self)(
            self.weight.to(device),
            self.direction.to(device),
            self.named.to(device),
            {name: features.to(device) for name, features in self.groups.items()},
        )


class _Entry(NamedTuple):
    weight: float
    direction: int


def load_feature_weights(path: str, features: Mapping[str, int]) -> dict[str, FeatureWeights]:
    """The weights in a YAML or JSON file; see `parse_feature_weights`."""
    return parse_feature_weights(read_yaml(path), path, features)


def parse_feature_weights(
    content: Any, path: str, features: Mapping[str, int]
) -> dict[str, FeatureWeights]:
    """The weights of single features.

    Args:
        content: of a weights file: for each site a default, entries by feature index, and groups.
            An entry is a weight, or `weight` and `direction`; a group is a list of features, or
            `features` with an entry for all of them. A missing default is 1; what has no entry, or
            none of the two in its entry, has the default's. An entry of its own overrides that of a
            group.
        path: of the file, for errors.
        features: m of each site.

    Returns:
        the weights of each site in the file.

    Raises:
        UserError: the content names a site or feature that does not exist, or an entry is not a
            finite weight of at least 0 and a direction.
    """
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise UserError(
            f"{path} does not hold weights by site",
            f"write '{next(iter(features), 'layer_25.resid_post')}:' and below it 'default: 1.0' "
            "and 'INDEX: WEIGHT'",
        )
    for site in content:
        if site not in features:
            raise UserError(
                f"{path} has weights for {site}, which is not a site of the store",
                f"its sites are {', '.join(features)}",
            )
    return {
        site: _SiteReader(f"{path}, {site}", features[site]).read(values)
        for site, values in content.items()
    }


class _SiteReader:
    """Reads what a file says about one site.

    Args:
        where: the file and the site, for errors.
        m: number of features.
    """

    def __init__(self, where: str, m: int) -> None:
        self.where, self.m = where, m

    def read(self, values: dict[Any, Any]) -> FeatureWeights:
        default = self._entry("default", values.get("default", 1), _Entry(1.0, 0))
        own: dict[int, _Entry] = {}
        for name, value in values.items():
            if name not in ("default", "groups"):
                index = self._index(name)
                if index in own:
                    raise UserError(f"{self.where}: two entries for feature {index}", "keep one")
                own[index] = self._entry(name, value, default)
        groups, of_groups = self._groups(values.get("groups", {}), default)
        weight = torch.full((self.m,), default.weight)
        direction = torch.full((self.m,), default.direction, dtype=torch.int8)
        for index, given in of_groups.items():
            if len(given) > 1 and index not in own:
                raise UserError(
                    f"{self.where}: groups give feature {index} different weights",
                    f"give it an entry of its own: '{index}: WEIGHT'",
                )
            for entry in given:
                weight[index], direction[index] = entry
        for index, entry in own.items():
            weight[index], direction[index] = entry
        named = torch.tensor(sorted(own | of_groups), dtype=torch.int64)
        return FeatureWeights(weight, direction, named, groups)

    def _groups(
        self, content: Any, default: _Entry
    ) -> tuple[dict[str, Tensor], dict[int, set[_Entry]]]:
        """The groups, and the entries that they give each of their features."""
        if not isinstance(content, dict):
            raise UserError(f"{self.where}: groups is not a mapping", "write 'NAME: [INDEX, ...]'")
        groups: dict[str, Tensor] = {}
        entries: dict[int, set[_Entry]] = {}
        for name, about in content.items():
            if not GROUP_NAME.fullmatch(str(name)):
                raise UserError(
                    f"{self.where}: the group {name!r} has no plain name",
                    "use letters, digits, - and _",
                )
            about = {"features": about} if isinstance(about, list) else about
            listed = about.get("features") if isinstance(about, dict) else None
            if not isinstance(listed, list) or not listed:
                raise UserError(
                    f"{self.where}: the group {name} has no features",
                    f"write '{name}: [INDEX, ...]' or '{name}: {{features: [INDEX, ...], weight: "
                    "5.0}'",
                )
            indices = sorted({self._index(one) for one in listed})
            settings = {key: value for key, value in about.items() if key != "features"}
            given = {self._entry(f"group {name}", settings, default)} if settings else set()
            for index in indices:
                entries.setdefault(index, set()).update(given)
            groups[str(name)] = torch.tensor(indices, dtype=torch.int64)
        return groups, entries

    def _index(self, name: Any) -> int:
        # Keys of a JSON object are strings.
        text = str(name)
        if (
            isinstance(name, bool)
            or not (text.isascii() and text.isdecimal())
            or int(text) >= self.m
        ):
            raise UserError(
                f"{self.where}: a weight for feature {name}, which does not exist",
                f"its features are 0 to {self.m - 1}",
            )
        return int(text)

    def _entry(self, name: Any, value: Any, default: _Entry) -> _Entry:
        """An entry; what it does not say is the default's."""
        about = value if isinstance(value, dict) else {"weight": value}
        if unknown := about.keys() - {"weight", "direction"}:
            raise UserError(
                f"{self.where}: {name} has {', '.join(map(str, sorted(unknown, key=str)))}",
                "an entry is a weight, or {weight: 5.0, direction: up}",
            )
        weight = about.get("weight", default.weight)
        direction = about.get("direction", _NAMES[default.direction])
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        # Written so that nan fails the comparison.
        if not number or not 0 <= weight <= torch.finfo(torch.float32).max:
            raise UserError(
                f"{self.where}: the weight {weight} for {name}",
                "a weight is a finite float32 number of at least 0",
            )
        if not isinstance(direction, str) or direction not in _DIRECTIONS:
            raise UserError(
                f"{self.where}: the direction {direction} for {name}",
                "use up (no rise above the reference), down (no fall below it) or both",
            )
        return _Entry(float(weight), _DIRECTIONS[direction])
