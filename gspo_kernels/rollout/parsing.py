"""Reads and checks the fields of engines' outputs. Every error names where in `outputs` the value stands."""

from __future__ import annotations

import numbers as abstract
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..base import checks

HIGHEST_ID = 2**63 - 1  # of int64
# Stands for minus infinity: vLLM's server writes -9999.0, SGLang the lowest float32; JSON has no infinity.
LOWEST = -9999.0
LAST_PART = (
    "the last part of a stream, which has only the newest tokens? Request whole responses: stream=false from a server, "
    "SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY), or CUMULATIVE, from an engine"
)


def get(output: Any, name: str) -> Any:
    """A field of an object or of its JSON; None where it has no such field."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def read_logprobs(where: str, values: list[Any], part: str = "") -> list[float]:
    """Log-probabilities as Python floats, NaN for None. An error names the value as `where[i]part`."""
    kinds = set(map(type, values))
    if kinds <= {float}:
        return values
    unchecked: Iterable[int] = range(len(values))
    if not any(issubclass(kind, Tensor) for kind in kinds):  # a type other than Tensor is checked once
        unchecked = sorted(dict(zip(map(type, reversed(values)), reversed(range(len(values))), strict=True)).values())
    for i in unchecked:
        _check_logprob(f"{where}[{i}]{part}", values[i])
    return [float("nan") if x is None else float(x) for x in values]


def _check_logprob(name: str, value: Any) -> None:
    if isinstance(value, Tensor):
        checks.shape(name, checks.tensor(name, value, "a log-probability"), (), "one log-probability")
        checks.digits(name, value)
    elif value is not None and (isinstance(value, bool) or not isinstance(value, abstract.Real)):
        raise TypeError(f"{name}: expected a log-probability, a number; got {checks.describe(value)}")
    elif getattr(getattr(value, "dtype", None), "itemsize", 8) < 4:
        raise TypeError(
            f"{name}: expected a log-probability in float32 or float64, because near 1 a step of 16 bits is larger "
            f"than GSPO's clip range; got {checks.describe(value)}"
        )


def read_ids(where: str, values: Any, part: str = "") -> list[int]:
    """Token ids as Python ints, from 0 to the largest int64. An error names the id as `where[i]part`."""
    if isinstance(values, Tensor) or (hasattr(values, "tolist") and hasattr(values, "dtype")):
        values = values.tolist()
    found: list[int] = read_list(where, values, "token ids")
    kinds = set(map(type, found))
    try:
        if any(issubclass(kind, (bool, Tensor)) for kind in kinds):
            raise TypeError
        found = found if kinds <= {int} else list(map(operator.index, found))
    except TypeError:
        found = [checks.whole(f"{where}[{i}]{part}", x, "a token id") for i, x in enumerate(found)]
    if found and not (min(found) >= 0 and max(found) <= HIGHEST_ID):
        at = next(i for i, x in enumerate(found) if not 0 <= x <= HIGHEST_ID)
        raise ValueError(f"{where}[{at}]{part}: expected a token id, from 0 to 2**63 - 1; got {found[at]}")
    return found


def read_list(where: str, values: Any, meaning: str) -> list[Any]:
    """Any iterable but text and dicts, as a list."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{where}: expected a sequence of {meaning}; got {describe(values)}")
    return list(values)


def list_outputs(outputs: Any, marks: tuple[str, ...]) -> list[Any]:
    """`outputs` as a list; an object with one of the fields `marks` is a single output."""
    if any(get(outputs, mark) is not None for mark in marks):
        return [outputs]
    if isinstance(outputs, (str, bytes, Mapping)) or not isinstance(outputs, Iterable):
        raise TypeError(f"outputs: expected an engine's outputs, or a sequence of them; got {describe(outputs)}")
    return list(outputs)


def read_prompts(prompts: Any, count: int) -> list[list[list[int]] | None]:
    """The caller's prompts: for each of `count` outputs those of its requests, of which most have one; or None."""
    if prompts is None:
        return [None] * count
    if isinstance(prompts, (str, bytes)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompt_ids: expected a sequence of prompts; got {describe(prompts)}")
    if len(prompts) != count:
        raise ValueError(f"prompt_ids: expected one element for each of the {count} outputs; got {len(prompts)}")
    found = list[list[list[int]] | None]()
    for k, given in enumerate(prompts):
        if _is_list(given) and len(given) and _is_list(given[0]):
            found.append([read_ids(f"prompt_ids[{k}][{i}]", prompt) for i, prompt in enumerate(given)])
        else:
            found.append([read_ids(f"prompt_ids[{k}]", given)])
    return found


def _is_list(value: Any) -> bool:
    return not isinstance(value, (str, bytes, Mapping)) and hasattr(value, "__len__") and getattr(value, "ndim", 1) > 0


def only_prompt(k: int, given: list[list[int]] | None) -> list[int] | None:
    """The prompt of an output that has one."""
    if given is None:
        return None
    if len(given) != 1:
        raise ValueError(
            f"prompt_ids[{k}]: expected one prompt, as outputs[{k}] has; got {len(given)}. Only a response of "
            "/v1/completions has several"
        )
    return given[0]


def agreed_prompt(where: str, returned: Any, given: list[int] | None) -> list[int] | None:
    """The prompt that the engine returned or the caller gave; refused where they differ."""
    if returned is None:
        return given
    found = read_ids(f"{where}.prompt_token_ids", returned)
    if given is not None and given != found:
        raise ValueError(
            f"prompt_ids: expected for {where} the prompt that the engine returned, of {len(found)} tokens; got "
            f"another, of {len(given)}"
        )
    return found


def check_count(where: str, count: int, tokens: int) -> None:
    """`count` values must match `tokens` sampled tokens."""
    if count != tokens:
        raise ValueError(
            f"{where}: expected one for each of the {tokens} sampled tokens; got {count}, which cannot be "
            "matched to them"
        )


def describe(value: Any) -> str:
    """A short account of an output that was refused, for an error message."""
    if isinstance(value, Mapping):
        return f"a dict with {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
    return "None" if value is None else f"a {type(value).__name__}"
