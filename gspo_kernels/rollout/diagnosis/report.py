"""The result of `diagnose_mismatch`, and its words."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses.clipped import GSPO
from .mistakes import rounded_to
from .pairings import Batch

WIDTH = 100  # columns of a report
NEAR = 1e-2  # nats: tokens that are nearer agree

NOTHING = "no token is counted: there is nothing to compare"
EQUAL = "nothing is wrong: old_logprobs are the trainer's own, up to float32 rounding"
NOISE = (
    "no mistake was found: the difference is small and has no pattern, as when one side computes in bfloat16. If both "
    "compute in float32, it is not rounding: are their weights the same?"
)
STALE = (
    "the log-probabilities are those of a policy that sampled these tokens, but not of this one: the engine's weights "
    "are not the trainer's, but older, quantized or of another adapter"
)
STALE_FIX = (
    "push the weights before sampling, and take old_logprobs before the first update  # push model.state_dict(): "
    "named_parameters() leaves out a tied lm_head, which then stays as it was; then llm.reset_prefix_cache()"
)
UNKNOWN = "none of the usual mistakes explains the difference"
NEEDS_LOGITS = (
    "token_ids_shifted", "logits_shifted", "temperature", "top_k", "top_p", "min_p", "logits_rounded",
    "most_likely_token",
)  # fmt: skip
NEEDS_NO_KEPT = ("temperature", "top_k", "top_p", "min_p", "logits_rounded")


@dataclass(frozen=True)
class MismatchCandidate:
    """How far log-probabilities are apart if this mistake was made, over the tokens that it compares.

    Differences are |logprob - old_logprob| of a token in nats, at most 20.
    """

    name: str  # "as_given", or that of a mistake
    mean: float  # over tokens; infinite if there is none to compare
    largest: float
    rms: float  # root mean square over tokens
    sequence_rms: float  # root mean square of a sequence's mean, the logarithm of GSPO's ratio
    clip_fraction: float  # of sequences, those that GSPO would clip
    tokens: int  # how many were compared
    missing: int  # tokens without a log-probability on one of the sides, in none of the numbers above
    fitted: tuple[tuple[str, float], ...]  # such as (("temperature", 0.7),)
    text: str  # what is wrong
    fix: str  # the line to change


@dataclass(frozen=True)
class MismatchDiagnosis:
    """What `diagnose_mismatch` found. `print(diagnosis)` shows it as a report."""

    agrees: bool  # whether the arrays are right as they are, up to noise
    cause: str | None  # the mistake, "stale_weights", or None: nothing is wrong, or nothing was found
    text: str  # what was found, in a sentence
    fix: str  # the line to change; empty if there is none
    candidates: tuple[MismatchCandidate, ...]  # as given, then all that was tried, the nearest first
    notes: tuple[str, ...]
    untried: tuple[str, ...]  # mistakes that these arguments do not allow to try
    tokens: int
    sequences: int  # with an unmasked token

    @property
    def given(self) -> MismatchCandidate:
        """The arrays as they are."""
        return self.candidates[0]

    def __str__(self) -> str:
        return _report(self)


# --- what is seen whatever the mistake --------------------------------------------------------------------------------


class Facts(NamedTuple):
    """Of the arrays as they are."""

    tokens: int  # unmasked
    sequences: int  # with an unmasked token
    is_one_sided: bool  # nearly all differences have one sign
    looks_stale: bool  # the old log-probabilities are of a distribution from which the tokens were sampled
    kl_k1: float
    kl_k3: float
    weight_mean: float  # of exp(logprob - old_logprob): 1 if the tokens were sampled from the old distribution


def facts_of(batch: Batch, new: Tensor, noise: float) -> Facts:
    tokens = int(batch.mask.sum())
    sequences = int((batch.per_sequence(batch.mask.double()) > 0.5).sum())
    use = batch.mask & new.isfinite() & batch.old.isfinite()
    r = (new - batch.old)[use]
    n = r.numel()
    if n < 64:
        return Facts(tokens, sequences, False, False, 0.0, 0.0, 1.0)
    mean, size = float(r.mean()), float(r.abs().mean())
    is_one_sided = size > 1e-3 and abs(mean) > 0.5 * size and abs(mean) > 6 * float(r.std()) / math.sqrt(n)
    weight = r.clamp(-20.0, 20.0).exp()
    weight_mean, spread = float(weight.mean()), float(weight.std())
    k1, k3 = -mean, float((torch.expm1(r.clamp(-20.0, 20.0)) - r).mean())
    effective = float(weight.sum().square() / (n * weight.square().sum()))
    looks_stale = (
        size > noise
        and effective > 0.1  # else the mean says nothing
        and abs(weight_mean - 1) < min(0.25, max(0.02, 4 * spread / math.sqrt(n)))
        and float(torch.corrcoef(torch.stack([new[use], batch.old[use]]))[0, 1]) > 0.5
        and k3 / 3 < k1 < 3 * k3
        and float(r.abs().median()) > 1e-4
    )
    return Facts(tokens, sequences, is_one_sided, looks_stale, k1, k3, weight_mean)


def notes_of(
    batch: Batch, new: Tensor, chosen: MismatchCandidate, given: MismatchCandidate, explained: bool, facts: Facts
) -> Iterator[str]:
    """chosen: what was found, or the arrays as they are; explained: whether what is left is noise."""
    if given.missing:
        yield (
            f"{given.missing:,} of {facts.tokens:,} tokens in the mask have no log-probability: NaN, infinite, -9999, "
            "or an id that is no column"
        )
    dtype = rounded_to(batch.old[batch.mask])
    if dtype is not None and "logprobs_rounded" not in chosen.name:
        yield (
            f"every old log-probability is exact in {str(dtype).removeprefix('torch.')}: they were rounded on the way. "
            "Keep them in float32"
        )
    if explained and chosen.mean > 0 and facts.tokens:
        yield _about_clipping(chosen)
    if not explained and facts.tokens - given.missing >= 64:
        yield from _about_the_unexplained(batch, new, facts)


def note_of_sampling(sampled: tuple[float, float] | None, given: float) -> Iterator[str]:
    """sampled: the temperature at which the tokens are most likely, and its standard error."""
    if sampled is None:
        return
    temperature, error = sampled
    if abs(temperature - given) > max(5 * error, 0.1 * given):
        yield (
            f"the tokens look sampled at temperature {temperature:.2f} +- {error:.2f}, not at {given:.4g}: the ratios "
            "are 1, but of another distribution than that of the sampling. Raw log-probabilities hide a temperature, "
            "top-p or top-k in this way; so does a batch from which responses were left out"
        )


def _about_clipping(chosen: MismatchCandidate) -> str:
    window = f"{GSPO.eps_low:g} below 1 to {GSPO.eps_high:g} above"
    clipped = f"{chosen.clip_fraction:.0%} of these responses are clipped before any update"
    if chosen.mean < 2e-5:
        return f"GSPO clips a ratio from {window}: {clipped}"
    tokens = (1.96 * chosen.rms / GSPO.eps_low) ** 2
    return (
        f"what remains is noise of {chosen.rms:.1e} nats a token (root mean square). GSPO clips a ratio from {window}: "
        f"{clipped}. If errors are independent, 95% of responses are inside from some {_round_up(tokens):,} tokens on. "
        "To have none, recompute old_logprobs with token_logprobs before the first update, and correct for the engine "
        "with rollout_weights"
    )


def _round_up(number: float) -> int:
    size = 10 ** max(0, math.floor(math.log10(max(number, 1.0))) - 1)
    return int(math.ceil(number / size) * size)


def _about_the_unexplained(batch: Batch, new: Tensor, facts: Facts) -> Iterator[str]:
    use = batch.mask & new.isfinite() & batch.old.isfinite()
    size = torch.where(use, (new - batch.old).abs().nan_to_num(0.0), 0.0)
    near = use & (size < NEAR)
    far = batch.per_sequence((use & ~near).double())
    counted = batch.per_sequence(use.double())
    agreeing = int(((far < 0.5) & (counted > 0.5)).sum())
    yield (
        f"{int(near.sum()) / max(1, int(use.sum())):.0%} of the tokens agree to {NEAR:g} nats, and {agreeing:,} of "
        f"{facts.sequences:,} responses in all their tokens"
    )
    rank = use.long().cumsum(0)
    of = batch.sequence_of
    before = torch.nn.functional.pad(rank, (1, 0))[batch.boundaries[:-1]]
    place = (rank - before[of]).double() / counted[of].clamp(min=1)
    parts = [size[use & (place > low) & (place <= low + 0.25)] for low in (0.0, 0.75)]
    if all(part.numel() >= 16 for part in parts):
        first, last = (float(part.mean()) for part in parts)
        yield f"the mean difference is {first:.2g} nats in the first quarter of a response and {last:.2g} in the last"
    yield (
        f"the mean of exp(logprob - old_logprob) is {facts.weight_mean:.3g}, and 1 if the tokens were sampled from the "
        f"old distribution; KL(old || new) is {facts.kl_k1:.3g} (k1) or {facts.kl_k3:.3g} (k3) nats a token, equal then"
    )


# --- the report -------------------------------------------------------------------------------------------------------


def _report(found: MismatchDiagnosis) -> str:
    head = f"{found.tokens:,} tokens of {found.sequences:,} responses"
    result = "Result: " if found.agrees or found.cause is None else "Found: "
    lines = [head, "", *_wrapped(result + found.text + ("" if found.text.endswith("?") else "."))]
    best = next((x for x in found.candidates if x.name == found.cause), None)
    if best is not None:
        fall = f"{_number(found.given.mean)} to {_number(best.mean)} nats a token"
        lines += _wrapped(f"The mean difference falls from {fall} ({found.cause}).")
    for fix in found.fix.split("\n") if found.fix else ():
        line, _, why = fix.partition("  # ")
        lines += ["", *_wrapped(f"Change: {line}")]
        lines += _wrapped(f"({why})", "  ") if why else []
    lines += ["", *_table(found)]
    if found.notes:
        lines += ["", "Notes"]
        for note in found.notes:
            lines += _wrapped(f"- {note}.", "  ")
    if found.untried:
        lines += [
            "",
            *_wrapped(f"Not tried, for want of logits over the whole vocabulary: {', '.join(found.untried)}."),
        ]
    return "\n".join(lines)


def _table(found: MismatchDiagnosis) -> Iterator[str]:
    """The difference under each hypothesis, with a star at the one that was found; of two together that one alone."""
    rows = [("difference in nats, if", "mean", "largest", "GSPO clips", "tokens", "missing")]
    for each in found.candidates:
        if " + " in each.name and each.name != found.cause:
            continue
        fitted = ", ".join(f"{name} {value:.4g}" for name, value in each.fitted)
        name = f"{'*' if each.name == found.cause else ' '} {each.name}{f' ({fitted})' if fitted else ''}"
        share = f"{each.clip_fraction:.0%}" if each.tokens else "-"
        numbers = (_number(each.mean), _number(each.largest)) if each.tokens else ("-", "-")
        rows.append((name, *numbers, share, f"{each.tokens:,}", f"{each.missing:,}" if each.missing else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        right = "  ".join(f"{x:>{width}}" for x, width in zip(others, widths[1:], strict=True))
        yield f"{first:<{widths[0]}}  {right}".rstrip()


def _number(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _wrapped(line: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        line, WIDTH, subsequent_indent=indent, initial_indent=indent if line.startswith("(") else "",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
