"""A method is a reward and a constraint; the paper's methods are names for the two."""

from typing import Any, Literal, get_args

from fpocli.system.errors import UserError

Reward = Literal["dpo", "dpo_norm", "simpo", "sft"]
Constraint = Literal["none", "features", "kl", "tdpo1"]
# The paper's methods are names for a reward and a constraint (Table 1).
METHODS: dict[str, tuple[Reward, Constraint]] = {
    "fpo": ("dpo_norm", "features"),
    "dpo_norm": ("dpo_norm", "none"),
    "dpo": ("dpo", "none"),
    "tdpo1": ("dpo", "tdpo1"),
    "tdpo2": ("dpo", "kl"),
    "simpo": ("simpo", "none"),
    "simpo_kl": ("simpo", "kl"),
    "sft": ("sft", "none"),
}


def parts_of(method: str) -> tuple[Reward, Constraint]:
    """Reward and constraint of a method's name, or of any two such as dpo+features.

    Raises:
        UserError: it is unknown.
    """
    known = METHODS | {
        f"{reward}+{constraint}": (reward, constraint)
        for reward in get_args(Reward)
        for constraint in get_args(Constraint)
    }
    if method not in known:
        raise UserError(
            f"--method {method} is unknown",
            f"use {', '.join(METHODS)}, or a reward and a constraint, such as dpo+features",
        )
    return known[method]


def complete(
    method: str, reward: Reward | None, constraint: Constraint | None
) -> tuple[Reward, Constraint]:
    """Reward and constraint; those that are None are the method's. In the place of another reward
    sft takes none of its constraint.

    Raises:
        UserError: the method is unknown.
    """
    named = parts_of(method)
    reward = reward or named[0]
    default = "none" if reward == "sft" and named[0] != "sft" else named[1]
    return reward, constraint or default


def override(general: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Settings with more specific ones over them: a file's with flags, a grid's with a run's.

    A method names a reward and a constraint, so it replaces both of the general settings. A reward
    or a constraint alone replaces that part of their method.
    """
    parts = {"reward", "constraint"}
    if "method" in own:
        replaced = parts
    elif own.keys() & parts and isinstance(method := general.get("method"), str):
        replaced = {"method"}
        reward, constraint = complete(method, own.get("reward"), own.get("constraint"))
        own = own | {"reward": reward, "constraint": constraint}
    else:
        replaced = set()
    return {name: value for name, value in general.items() if name not in replaced} | own
