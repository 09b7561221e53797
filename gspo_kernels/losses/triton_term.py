"""An objective's term in Triton's language: beside the torch terms, and compiled into the token stage's kernel."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

MOST_PARAMETERS = 4


class _TritonFunction:
    """A function in Triton's language, compiled when it is first used.

    Triton is imported then. Until then the names that a function uses (`tl`, and the functions of
    `gspo_kernels.rows.triton_math`) need not exist: import them under TYPE_CHECKING.
    """

    given: ClassVar[tuple[str, ...]]  # its parameters, before those for the objective's fields

    def __init__(self, function: Callable[..., Any]) -> None:
        if function.__code__.co_argcount != len(self.given) + MOST_PARAMETERS:
            raise TypeError(
                f"{function.__name__}: expected {len(self.given) + MOST_PARAMETERS} parameters: "
                f"{', '.join(self.given)} and {MOST_PARAMETERS} more for fields of the objective; got "
                f"{inspect.signature(function)}"
            )
        self._function = function

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


class TritonTerm(_TritonFunction):
    """Decorates a function that computes `Objective.terms` in Triton's language, for `Objective.triton_term`.

        @TritonTerm
        def unclipped_term(
            log_ratio, advantage, max_log_ratio, logprob, old_logprob, rollout_logprob, p0, p1, p2, p3
        ):
            saturated = log_ratio > max_log_ratio
            ratio = exp(tl.where(saturated, max_log_ratio, log_ratio))
            slope = tl.where(saturated, 0.0, -ratio * advantage)
            never = ratio < 0.0
            return -ratio * advantage, slope, never, never

    A term is called for a block of units (tokens, or one sequence), in float32. It returns, per unit, the loss, its
    derivative by the log-probability (through the log-ratio and directly), and whether the unit is clipped at the lower
    and at the upper bound. The last four parameters are the objective's fields in their order, as run-time values: None
    arrives as NaN, with which every comparison is False; a string of a `Literal` as its position. What a term does not
    use costs nothing. The log-probabilities are those of a token (0 for a sequence); a class whose term uses them
    declares `uses_logprobs`. `rollout_logprob` is `old_logprob` where the caller gives none.
    """

    given = ("log_ratio", "advantage", "max_log_ratio", "logprob", "old_logprob", "rollout_logprob")

    def reads_logprobs(self) -> bool:
        """Whether it uses a log-probability, and not the log-ratio alone."""
        loaded = [each.argval for each in dis.get_instructions(self._function) if each.opname.startswith("LOAD_FAST")]
        names = {name for value in loaded for name in ((value,) if isinstance(value, str) else value)}
        return not names.isdisjoint(self._function.__code__.co_varnames[3 : len(self.given)])


class TritonHold(_TritonFunction):
    """Decorates a function that bounds a token's log-ratio before the mean over its sequence is taken (GMPO).

    It takes a token's log-ratio and advantage, and the objective's fields as a `TritonTerm` does. It returns the bound
    that the log-ratio is held at, and whether it is held at a lower and at an upper one: where it is neither, the
    log-ratio itself enters the mean, and the token has a gradient.
    """

    given = ("log_ratio", "advantage")
