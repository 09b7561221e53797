"""Objectives by the names that a configuration file has: for trainers that hand a loss nothing but plain values."""

from __future__ import annotations

import inspect
import math

from ..base import checks
from ..losses.clipped import GMPO, GRPO, PPO, SAPO, GSPOToken
from ..losses.objectives import Objective
from ..losses.weighted import CISPO, DPPO, DRO, TOPRToken

__all__ = ["objective_of"]

# All take one advantage per token, which is what trainers have. GSPO-token equals GSPO where the tokens of a response
# have one advantage.
OBJECTIVES: dict[str, type[Objective]] = {
    "gspo": GSPOToken,
    "grpo": GRPO,
    "ppo": PPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "gmpo": GMPO,
    "dppo": DPPO,
    "dro": DRO,
    "topr": TOPRToken,
}


def objective_of(name: str, **parameters: float | str | None) -> Objective:
    """The objective of this name.

    Args:
        name: a key of `OBJECTIVES`.
        parameters: of its class, such as `eps_low` and `eps_high`. What is left out has the class's default. Where None
            means that there is no bound, infinity does too, because TOML has no None.

    Raises: ValueError, TypeError: naming the parameter, what was expected and what came.
    """
    checks.choice("objective", name, tuple(OBJECTIVES))
    kind = OBJECTIVES[name]
    known = list(inspect.signature(kind).parameters)
    for parameter in parameters:
        if parameter not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f'{parameter}: expected a parameter of objective "{name}", which has {names}; remove it')
    unbounded = [key for key in ("dual_clip", "max_ratio") if parameters.get(key) == math.inf]
    return kind(**parameters | dict.fromkeys(unbounded))
