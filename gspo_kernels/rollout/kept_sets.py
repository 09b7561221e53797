"""The sets of tokens that an engine's filters kept, read from its outputs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from ..rows.kept import HIGHEST_ID
from .parsing import check_count, read_ids, read_list


class KeptSets(NamedTuple):
    """The ids from which each token of a response was drawn."""

    where: str  # their position in `outputs`, for error messages
    rows: list[list[int]]  # one list per token


def read_kept(where: str, rows: Any, tokens: int) -> KeptSets | None:
    """One list of ids for each of `tokens` tokens; None where the engine returned no such lists."""
    if rows is None:
        return None
    found = read_list(where, rows, "lists of token ids, one per sampled token")
    check_count(where, len(found), tokens)
    lists = [row.tolist() if hasattr(row, "tolist") else row for row in found]
    flat = list(itertools.chain.from_iterable(lists)) if set(map(type, lists)) <= {list} else None
    if flat is None or not set(map(type, flat)) <= {int}:
        lists = [read_ids(f"{where}[{i}]", row) for i, row in enumerate(lists)]
        flat = list(itertools.chain.from_iterable(lists))
    if flat and not (min(flat) >= 0 and max(flat) <= HIGHEST_ID):
        i, wrong = next((i, x) for i, row in enumerate(lists) for x in row if not 0 <= x <= HIGHEST_ID)
        raise ValueError(f"{where}[{i}]: expected token ids, from 0 to 2**31 - 1; got {wrong}")
    if sum(map(len, map(set, lists))) < len(flat):
        i, twice = next((i, x) for i, row in enumerate(lists) for j, x in enumerate(row) if x in row[:j])
        raise ValueError(f"{where}[{i}]: expected each id once; got id {twice} twice")
    return KeptSets(where, lists)


LEAST_CERTAIN = -1e-3  # a token that is alone in its set has log-probability 0, but for an engine's rounding


def kept_rows(
    found: list[tuple[str, list[int], KeptSets | None]], mask: list[bool], logprobs: list[float]
) -> list[list[int]] | None:
    """The sets of all tokens of all responses (where, tokens, sets); None where no response has sets.

    Raises: ValueError where some responses have sets and others have none, where a token that counts is not in its set
        (an empty set is no set: neither engine writes one), and where a token that is alone in its set was not certain:
        log-probabilities are then those of the whole vocabulary.
    """
    first = next((sets for *_, sets in found if sets is not None), None)
    if first is None:
        return None
    rows = list[list[int]]()
    for where, tokens, sets in found:
        if sets is None:
            if tokens:
                raise ValueError(
                    f"{where}: expected the ids that the sampling filters kept, as {first.where} has them; got none. "
                    "Request them for all responses, or for none"
                )
            continue
        for i, (token, row) in enumerate(zip(tokens, sets.rows, strict=True)):
            if not mask[len(rows) + i]:
                continue
            if token not in row:
                raise ValueError(
                    f"{sets.where}[{i}]: expected the sampled token, id {token}, among the ids that were kept; got "
                    f"{len(row)} others"
                )
            if len(row) == 1 and logprobs[len(rows) + i] < LEAST_CERTAIN:
                raise ValueError(
                    f"{where}: expected log-probabilities over the ids that were kept, so 0 for its token {i}, which "
                    f"was the only one; got {logprobs[len(rows) + i]:g}, as of the whole vocabulary. vLLM needs "
                    'logprobs_mode="processed_logprobs" beside return_sampling_mask'
                )
        rows += sets.rows
    return rows
