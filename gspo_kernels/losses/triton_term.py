"""An objective's term in Triton's language: beside the torch terms, and compiled into the token stage's kernel."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any

MOST_PARAMETERS = 4
_GIVEN = ("log_ratio", "advantage", "max_log_ratio", "logprob", "old_logprob")


class TritonTerm:
    """Decorates a function that computes `Objective.terms` in Triton's language, for `Objective.triton_term`.

        @TritonTerm
        def unclipped_term(log_ratio, advantage, max_log_ratio, logprob, old_logprob, p0, p1, p2, p3):
            saturated = log_ratio > max_log_ratio
            ratio = exp(tl.where(saturated, max_log_ratio, log_ratio))
            slope = tl.where(saturated, 0.0, -ratio * advantage)
            never = ratio < 0.0
            return -ratio * advantage, slope, never, never

    A term is called for a block of units (tokens, or one sequence), in float32. It returns, per unit, the loss, its
    derivative by the log-ratio (which is that by the log-probability), and whether the unit is clipped at the lower and
    at the upper bound. The last four parameters are the objective's fields in their order, as run-time values; None
    arrives as NaN, with which every comparison is False. What a term does not use costs nothing. The log-probabilities
    are those of a token (0 for a sequence); a class whose term uses them declares `uses_logprobs`.

    Triton is imported when the first term is compiled. Until then the names that a term uses (`tl`, and the functions
    of `gspo_kernels.rows.triton_math`) need not exist: import them under TYPE_CHECKING.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        if function.__code__.co_argcount != len(_GIVEN) + MOST_PARAMETERS:
            raise TypeError(
                f"{function.__name__}: expected {len(_GIVEN) + MOST_PARAMETERS} parameters: {', '.join(_GIVEN)} and "
                f"{MOST_PARAMETERS} more for fields of the objective; got {inspect.signature(function)}"
            )
        self._function = function

    def reads_logprobs(self) -> bool:
        """Whether it uses the fourth or the fifth parameter."""
        loaded = [each.argval for each in dis.get_instructions(self._function) if each.opname.startswith("LOAD_FAST")]
        names = {name for value in loaded for name in ((value,) if isinstance(value, str) else value)}
        return not names.isdisjoint(self._function.__code__.co_varnames[3:5])

    @functools.cached_property
    def compiled(self) -> Any:
        """The function as Triton's kernels call it."""
        import triton  # type: ignore
        import triton.language  # type: ignore

        from ..rows import triton_math

        names = self._function.__globals__
        for name in self._function.__code__.co_names:
            if name == "tl":
                names.setdefault(name, triton.language)
            elif hasattr(triton_math, name):
                names.setdefault(name, getattr(triton_math, name))
        return triton.jit(self._function)
