"""What old log-probabilities, or the trainer's, would have to be if a usual mistake had been made: one `Trial` each."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import Distribution, Filter, Sample
from .pairings import Batch, Pairing

NEAR = 0.06  # nats: a fit to the sample that is no nearer is not computed for all rows
PROCESSED = (
    'vLLM: LLM(logprobs_mode="processed_logprobs"); SGLang: without SGLANG_RETURN_ORIGINAL_LOGPROB, which both '
    "return log-probabilities at the sampling's temperature"
)


class Trial(NamedTuple):
    """Log-probabilities, [N] float64, that are equal to noise if the mistake was made. NaN: none."""

    name: str
    text: str  # what is wrong, as a sentence without its end
    fix: str  # the line to change; a comment after "  #"
    new: Tensor
    old: Tensor
    counted: Tensor  # [N] bool
    of_mask: bool = False  # other tokens are counted than the mask says
    fitted: tuple[tuple[str, float], ...] = ()


def of_pairing(batch: Batch, new: Tensor, pairing: Pairing) -> Trial:
    name, text, fix, _, _, counted, of_mask = pairing
    return Trial(name, text, fix, new, pairing.old_of(batch.old), counted, of_mask)


def joined(first: Pairing, second: Trial) -> Trial:
    """Two mistakes together; `second` was made of the tokens that `first` pairs."""
    return second._replace(
        name=f"{first.name} + {second.name}",
        text=f"{first.text}; {second.text}",
        fix=f"{first.fix}\n{second.fix}",
        of_mask=first.of_mask,
    )


# --- values: what was done to the log-probabilities -------------------------------------------------------------------


def of_values(new: Tensor, old: Tensor, counted: Tensor) -> Iterator[Trial]:
    """Probabilities, signs, bases and factors."""
    use = counted & old.isfinite() & new.isfinite()
    some = old[use]
    if some.numel() == 0:
        return
    if bool((some >= 0).all()) and bool((some <= 1 + 1e-3).all()) and bool((some > 0).any()):
        yield Trial(
            "probabilities", "old_logprobs are probabilities", "old_logprobs = old_logprobs.log()",
            new, old.clamp(min=0).log(), counted,
        )  # fmt: skip
    squares = float(new[use].square().sum())
    factor = float((new[use] * some).sum()) / squares if squares > 0 else 1.0
    if not 0.05 < abs(factor) < 20 or abs(factor - 1) < 0.02:
        return
    for name, text, exact, fix in (
        ("negated", "old_logprobs have the other sign: negative log-likelihoods", -1.0, "old_logprobs = -old_logprobs"),
        ("base_2", "old_logprobs are logarithms to base 2", 1 / math.log(2), "old_logprobs *= math.log(2)"),
        ("base_10", "old_logprobs are logarithms to base 10", 1 / math.log(10),
         "old_logprobs *= math.log(10)"),
    ):  # fmt: skip
        if abs(factor / exact - 1) < 0.02:
            yield Trial(name, text, fix, new, old / exact, counted)
    yield Trial(
        "scaled", f"old_logprobs are the trainer's times {factor:.4g}",
        f"old_logprobs = old_logprobs / {factor:.4g}  # a temperature divides logits, never log-probabilities",
        new, old / factor, counted, fitted=(("factor", factor),),
    )  # fmt: skip


def of_sums(batch: Batch, new: Tensor) -> Iterator[Trial]:
    """Numbers of a whole response in place of its tokens'."""
    old, mask = batch.old, batch.mask
    of = batch.sequence_of
    clean = torch.where(mask & new.isfinite(), new, 0.0)
    total = batch.per_sequence(clean)[of]
    count = batch.per_sequence(mask.double()).clamp(min=1)[of]
    per_token = "old_logprobs holds one number per token: CompletionOutput.logprobs, not cumulative_logprob; from_vllm "
    per_token = f"# {per_token}reads them"
    yield Trial(
        "sequence_sums", "each token has the sum of its response's log-probabilities",
        f"old_logprobs = rollouts.old_logprobs  {per_token}", total / count, old / count, mask,
    )  # fmt: skip
    yield Trial(
        "sequence_means", "each token has the mean of its response's log-probabilities",
        f"old_logprobs = rollouts.old_logprobs  {per_token}", total / count, old, mask,
    )  # fmt: skip
    rows = mask.nonzero()[:, 0]
    before = torch.zeros_like(old)
    if rows.numel():
        previous = torch.nn.functional.pad(old[rows[:-1]], (1, 0))
        starts = torch.nn.functional.pad(of[rows[1:]] != of[rows[:-1]], (1, 0), value=True)
        before[rows] = torch.where(starts, 0.0, previous)
    yield Trial(
        "cumulative_sums", "each token has the sum of the log-probabilities up to it",
        "old_logprobs = old_logprobs.diff(dim=-1, prepend=...)  # of each response; its first token's is its own",
        new, old - before, mask,
    )  # fmt: skip


def rounded_to(values: Tensor) -> torch.dtype | None:
    """The 16-bit dtype in which all of these are exact, if that cannot be chance."""
    some = values[(values != 0) & values.isfinite()]
    if some.unique().numel() < 8:
        return None
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(some.to(dtype).double(), some):
            return dtype
    return None


def of_rounding(batch: Batch, new: Tensor) -> Iterator[Trial]:
    dtype = rounded_to(batch.old[batch.mask])
    if dtype is not None:
        name = str(dtype).removeprefix("torch.")
        yield Trial(
            "logprobs_rounded", f"old_logprobs were rounded to {name}: each of them is exact in it",
            f"keep old_logprobs in float32 from the engine to the loss  # no .to({dtype}), no autocast, and with FSDP2 "
            "MixedPrecisionPolicy(cast_forward_inputs=False); a cast back does not restore the digits",
            new.to(dtype).double(), batch.old, batch.mask,
        )  # fmt: skip


# --- distributions: of what the log-probabilities are -----------------------------------------------------------------


def of_distribution(batch: Batch, distribution: Distribution, sample: Sample) -> Iterator[Trial]:
    """All that needs logits, with tokens and rows paired as given."""
    old, mask = batch.old, batch.mask
    if distribution.kept is not None:
        yield Trial(
            "whole_vocabulary", "old_logprobs are of the whole vocabulary, those of the loss of the kept columns",
            f"old_logprobs of the kept columns  # {PROCESSED}; with SGLang take output_token_sampling_logprobs",
            distribution.at(distribution.temperature), old, mask,
        )  # fmt: skip
    else:
        yield from of_temperature(distribution, sample, old, mask)
        yield from of_filters(distribution, sample, old, mask, (sample.given,))
        for dtype in (torch.bfloat16, torch.float16):
            if distribution.logits.dtype in (torch.float32, torch.float64):
                name = str(dtype).removeprefix("torch.")
                yield Trial(
                    f"logits_rounded_to_{name}", f"old_logprobs are of logits that were rounded to {name}",
                    "compute both in float32 logits, or both with rounded ones  # vLLM and SGLang run a bfloat16 head "
                    "in bfloat16; GSPO-kernels' linear losses do not round",
                    distribution.rounded(dtype, mask), old, mask,
                )  # fmt: skip
    yield Trial(
        "most_likely_token", "old_logprobs are those of the most likely token, not of the sampled one",
        "take the sampled token's entry: step[token_id].logprob  # vLLM returns both; from_vllm takes the right one",
        distribution.at(distribution.temperature, ids=distribution.most_likely()), old, mask,
    )  # fmt: skip
    if distribution.temperature_is_not_1:
        plain = distribution.at(1.0)
        for each in of_values(plain, old, mask):
            if each.name == "scaled":
                yield each._replace(
                    name="temperature_divides_logprobs",
                    text=f"old_logprobs are log-probabilities of temperature 1 times {each.fitted[0][1]:.4g}: a "
                    "temperature divided log-probabilities",
                    fix="old_logprobs = (logits / temperature).log_softmax(-1)  # divide before log_softmax, not after",
                )


def of_temperature(
    distribution: Distribution, sample: Sample, old: Tensor, counted: Tensor, shift: int = 0
) -> Iterator[Trial]:
    """The temperature that fits best; one that has a name, or few digits, if it fits as well."""
    fit = sample.temperature(old, counted, shift)
    if fit is None:
        return
    given = sample.given
    names = {}
    if sample.is_number and given != 1.0:
        names = {
            1.0: "temperature_not_applied",
            given**2: "temperature_applied_twice",
            1 / given: "temperature_inverted",
        }
    enough = 1.5 * fit.mean + 2e-6
    rounded = [round(fit.value, digits) for digits in (1, 2, 3)]
    near = [x for x in (given, *names, *rounded) if x > 0 and abs(x / fit.value - 1) < 0.05]
    value = next((x for x in near if sample.difference_at(x, old, counted, shift) <= enough), fit.value)
    if value == given:
        return
    name = names.get(value, "another_temperature")
    sampled = sample.likeliest_temperature(counted) if shift == 0 else None
    text, fix = _about_temperature(sample, value, sampled)
    new = distribution.at(sample.as_argument(value), shift)
    label = "temperature" if sample.is_number else "times the given temperature"
    yield Trial(name, text, fix, new, old, counted, fitted=((label, value),))


def _about_temperature(sample: Sample, value: float, sampled: tuple[float, float] | None) -> tuple[str, str]:
    """What is wrong, and what to change: by the temperature at which the tokens themselves look sampled."""
    given = sample.given
    if not sample.is_number:
        return (
            f"old_logprobs are of {value:.4g} times the temperatures that the loss is given",
            f"pass temperature=temperature * {value:.4g} to the loss, if the engine sampled at it",
        )
    text = f"old_logprobs are of temperature {value:.4g}, the loss is given {given:.4g}"
    inverse = 1 / value
    if abs(inverse - round(inverse, 2)) < 1e-4 < abs(value - round(value, 2)):
        text += f" (1 / {inverse:.4g}: were the logits divided by {inverse:.4g} before?)"
    pass_it = f"pass temperature={value:.4g} to the loss"
    raw = f"ask the engine for log-probabilities at temperature {given:.4g}: {PROCESSED}"
    if value == 1.0:
        text += ": it was not applied to them, or it has already been applied to the logits"
        pass_it = f"pass no temperature= to the loss: it sampled at 1, or the logits are divided by {given:.4g} already"
    if sampled is not None:
        temperature, error = sampled
        at_value, at_given = (abs(temperature - x) <= 3 * error for x in (value, given))
        if at_value != at_given:
            said = f"the tokens look sampled at {temperature:.2f} +- {error:.2f}"
            return text, f"{pass_it if at_value else raw}  # {said}"
    return text, f"{pass_it}, if the engine sampled at {value:.4g}; or {raw}"


def of_filters(
    distribution: Distribution, sample: Sample, old: Tensor, counted: Tensor, values: tuple[float, ...]
) -> Iterator[Trial]:
    """Top-k, top-p, min-p, and top-k with top-p, at these temperatures."""
    for found in sample.filters(old, counted, values):
        temperature = sample.as_argument(found.temperature)
        if found.mean > NEAR:  # the sample is enough for the table
            rows = torch.zeros_like(counted)
            rows[found.rows] = True
            new = torch.full_like(old, torch.nan)
            new[found.rows] = found.logprobs
        else:
            rows, new = counted, distribution.filtered(temperature, counted, **found.options)
        outside = rows & new.isnan()  # rounding moves columns across a filter's edge
        if int(outside.sum()) <= 0.02 * int(rows.sum()):
            rows = rows & ~outside
        yield Trial(
            "_and_".join(found.options), *_about_filter(sample, found), new, old, rows,
            fitted=(*found.options.items(), *_if_other(sample, found)),
        )  # fmt: skip


def _if_other(sample: Sample, found: Filter) -> tuple[tuple[str, float], ...]:
    return () if found.temperature == sample.given else (("temperature", found.temperature),)


def _about_filter(sample: Sample, found: Filter) -> tuple[str, str]:
    said = ", ".join(f"{name}={value:.4g}" for name, value in found.options.items())
    text = f"old_logprobs are of the columns that {said} keeps, the loss is of the whole vocabulary"
    options, also = said, ""
    if _if_other(sample, found):
        text += f", and of temperature {found.temperature:.4g}, the loss is given {sample.given:.4g}"
        also = f", temperature={found.temperature:.4g}"
    if found.temperature != 1.0:
        options += f", temperature={found.temperature:.4g}"
    return text, (
        f"pass kept=rollouts.kept{also} to the loss, from LLM(return_sampling_mask=True) or SGLang's "
        "return_sampling_mask=True; where the engine returns none, "
        f"kept=KeptTokens.from_logits(logits, {options}, mask=mask)"
    )


# --- two mistakes together --------------------------------------------------------------------------------------------


def of_pairs(
    batch: Batch, distribution: Distribution | None, sample: Sample | None, new: Tensor, pairing: Pairing
) -> Iterator[Trial]:
    """With this pairing, a mistake about values, or about the temperature."""
    shifted = new if distribution is None else distribution.logprobs(pairing.shift)
    old = pairing.old_of(batch.old)
    for trial in of_values(shifted, old, pairing.counted):
        yield joined(pairing, trial)
    if distribution is not None and sample is not None and distribution.kept is None:
        fit = sample.temperature(old, pairing.counted, pairing.shift)
        if fit is not None and fit.mean < NEAR:
            for trial in of_temperature(distribution, sample, old, pairing.counted, pairing.shift):
                yield joined(pairing, trial)
