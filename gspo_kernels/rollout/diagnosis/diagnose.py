"""Why ratios are not 1 before the first update: usual mistakes are tried, and the one that explains it is named."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...base import checks
from ...base.layout import BatchShape, batch_shape, check_boundaries
from ...losses.clipped import GSPO
from ...rows.arguments import check_kept_tokens, check_logits, check_token_ids, row_arrays
from ...rows.kept import KeptTokens
from . import report as text
from .distributions import MOST, TEMPERATURES, Distribution, Sample
from .mistakes import Trial, of_distribution, of_filters, of_pairing, of_pairs, of_rounding, of_sums, of_values
from .pairings import LOWEST, SENTINEL, Batch, as_given, other_tokens, pairings, permutation
from .report import MismatchCandidate, MismatchDiagnosis

EQUAL = 2e-5  # nats a token: what float32 kernels of two programs differ by on average, ten times over
EXACT = 1e-4  # what is left if the trainer's logits are rounded otherwise, and nothing else
NOISE = 5e-2  # what bfloat16 makes of it


@torch.no_grad()
def diagnose_mismatch(
    logits: Tensor | None,
    token_ids: Tensor,
    old_logprobs: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    kept: KeptTokens | None = None,
    vocab_size: int | None = None,
    logprobs: Tensor | None = None,
) -> MismatchDiagnosis:
    """Why the ratios of a loss are not 1 before the first update: `print(diagnose_mismatch(...))`.

    Call it once, on the first batch, with what the loss will be given and weights that have not been updated since the
    batch was sampled. The usual mistakes are tried one after the other, some of them two together: arrays that are
    shifted, a mask of other tokens, padding on another side, another order of responses; another temperature, filters,
    rounding, the wrong quantity. The diagnosis names the one under which the difference falls to noise, with the
    numbers and the line to change, and says so if there is none. docs/diagnose.md lists them, and what cannot be seen.

    It waits for the device, reads the logits a dozen times or two, and keeps no state: it is for one batch, not for
    every step. For those see `rollout_mismatch`.

    Args:
        logits: [B, T, V] or packed [N, V], any float dtype, as for the loss: row t predicts `token_ids[t]`. Finished,
            after the model's own softcap and scale. Never copied; fits look at some rows. None: pass `logprobs`.
        token_ids: integers [B, T] or [N].
        old_logprobs: same shape: what the loss will be given, with its mistakes. float32 or float64; the 16-bit dtypes,
            positive numbers, NaN and infinities are accepted here.
        mask: one per token, True (or 1) where it counts.
        cu_seqlens: int32 or int64 boundaries of packed sequences: 0, ..., N.
        temperature: what the loss will divide the logits by: a number, one per token or, padded, one per sequence
            [B, 1].
        kept: the columns from which each token was sampled, if the loss is given them.
        vocab_size: columns from this one on are padding. None: all columns are tokens.
        logprobs: the trainer's own log-probabilities, float32 or float64, where logits do not exist (from hidden
            states) or are sharded. What needs logits is then not tried. `temperature` and `kept` have no effect.

    Returns: `MismatchDiagnosis`.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if logits is None:
        distribution, new, shape = None, *_trainers(logprobs, token_ids, mask, cu_seqlens)
        row_arrays(torch.float32, token_ids, None, temperature, 1.0, None)
        if vocab_size is not None:
            checks.whole("vocab_size", vocab_size, "how many columns are tokens", at_least=1)
    else:
        columns = check_logits(logits, token_ids, False, vocab_size, None)
        if logprobs is not None:
            raise ValueError(
                f"logprobs: expected None with logits, of which they are computed; got {checks.describe(logprobs)}"
            )
        shape = batch_shape(token_ids.shape, mask, cu_seqlens, logits.device)
        row_arrays(logits.dtype, token_ids, None, temperature, 1.0, None)
        distribution, new = Distribution(logits, token_ids, temperature, kept, columns), None
    check_kept_tokens(kept, token_ids)
    batch = _batch(shape, old_logprobs)
    if distribution is not None:
        new = distribution.logprobs()
    assert new is not None
    return _diagnose(batch, new, distribution)


def _trainers(logprobs: Any, token_ids: Any, mask: Any, cu_seqlens: Any) -> tuple[Tensor, BatchShape]:
    """The trainer's own log-probabilities, [N] float64."""
    name, meaning = "logprobs", "the trainer's log-probabilities per token, because there are no logits"
    found = checks.tensor(name, logprobs, meaning).detach()
    checks.digits(name, found)
    if found.ndim not in (1, 2):
        raise ValueError(f"{name}: expected [sequences, tokens] or, packed, [tokens]; got {list(found.shape)}")
    check_token_ids(token_ids, found.shape, found.device, "log-probability")
    shape = batch_shape(found.shape, mask, cu_seqlens, found.device)
    return shape.log_probabilities(name, found, meaning).reshape(-1).double(), shape


def _batch(shape: BatchShape, old_logprobs: Any) -> Batch:
    name, meaning = "old_logprobs", "log-probabilities under the policy that sampled"
    old = checks.tensor(name, old_logprobs, meaning).detach()
    checks.operand(name, old, meaning)
    checks.shape(name, old, shape.tokens, f"{meaning}, one per token")
    checks.same_device(name, old, shape.device)
    old = old.reshape(-1).double()
    old = torch.where(old.isfinite() & (old != SENTINEL) & (old > LOWEST), old, torch.nan)
    count, device = old.numel(), shape.device
    mask = torch.ones(count, dtype=torch.bool, device=device) if shape.mask is None else shape.mask.reshape(-1)
    if shape.cu_seqlens is not None:
        check_boundaries(shape.cu_seqlens, count)
        return Batch(old, mask, shape.cu_seqlens.long(), None)
    rows, width = shape.tokens
    return Batch(old, mask, torch.arange(rows + 1, device=device) * width, width)


def _diagnose(batch: Batch, new: Tensor, distribution: Distribution | None) -> MismatchDiagnosis:
    given = of_pairing(batch, new, as_given(batch))
    scores = _Scores(batch, given)
    if scores.given_is_equal:
        return _conclude(batch, new, distribution, scores, None)
    sample = None if distribution is None else Sample(distribution, _rows_to_sample(batch))
    for stage, enough in ((_single_mistakes, EXACT), (_rarer_mistakes, NOISE), (_two_mistakes, NOISE)):
        for trial in stage(batch, new, distribution, sample):
            scores.add(trial)
        found = scores.best()
        if found is not None and _distance(found) <= enough:
            break
    return _conclude(batch, new, distribution, scores, scores.best())


def _single_mistakes(
    batch: Batch, new: Tensor, distribution: Distribution | None, sample: Sample | None
) -> Iterator[Trial]:
    """In the order in which one is preferred to another that explains the same."""
    for pairing in pairings(batch, distribution is not None):
        shifted = new if distribution is None else distribution.logprobs(pairing.shift)
        yield of_pairing(batch, shifted, pairing)
    yield from of_rounding(batch, new)
    yield from of_values(new, batch.old, batch.mask)
    yield from of_sums(batch, new)
    if distribution is not None and sample is not None:
        yield from of_distribution(batch, distribution, sample)
    for pairing in other_tokens(batch):
        yield of_pairing(batch, new, pairing)


def _rarer_mistakes(
    batch: Batch, new: Tensor, distribution: Distribution | None, sample: Sample | None
) -> Iterator[Trial]:
    found = permutation(batch, new)
    if found is not None:
        yield of_pairing(batch, new, found)
    if distribution is not None and sample is not None and distribution.kept is None:
        yield from of_filters(distribution, sample, batch.old, batch.mask, TEMPERATURES)


def _two_mistakes(
    batch: Batch, new: Tensor, distribution: Distribution | None, sample: Sample | None
) -> Iterator[Trial]:
    for pairing in (*pairings(batch, distribution is not None), *other_tokens(batch)):
        yield from of_pairs(batch, distribution, sample, new, pairing)


def _rows_to_sample(batch: Batch) -> Tensor:
    """Those of the mask, and as many again that have old log-probabilities elsewhere."""
    counted = batch.mask.nonzero()[:, 0]
    others = (batch.filled & ~batch.mask).nonzero()[:, 0]
    if others.numel() > counted.numel() > 0:
        step = torch.linspace(0, others.numel() - 1, counted.numel(), device=others.device, dtype=torch.float64)
        others = others[step.long()]
    return torch.cat([counted, others]).sort().values


class _Scores:
    """What was tried, in order, and which of it explains the difference."""

    def __init__(self, batch: Batch, given: Trial) -> None:
        self.batch, self._given = batch, given
        self.given = self._score(given)
        self.found = list[tuple[MismatchCandidate, bool]]()  # and whether it explains the difference

    @property
    def given_is_equal(self) -> bool:
        return _distance(self.given) <= EQUAL

    def add(self, trial: Trial) -> None:
        score = self._score(trial)
        self.found.append((score, self._explains(trial, score)))

    def best(self) -> MismatchCandidate | None:
        """The first that explains the difference about as well as the one that leaves least."""
        those = [score for score, explains in self.found if explains]
        enough = 1.5 * min(map(_distance, those), default=0.0) + 2e-6
        return next((score for score in those if _distance(score) <= enough), None)

    def _explains(self, trial: Trial, score: MismatchCandidate) -> bool:
        """Whether the difference falls to noise, by far, and on enough tokens for that to be no chance."""
        before = _distance(self.given)
        if not trial.of_mask:  # not because a few tokens were left out
            common = trial.counted & self._given.counted & self._given.new.isfinite() & trial.new.isfinite()
            before = min(before, _distance(self._score(self._given._replace(counted=common))))
        left = _distance(score)
        named = score.name == "logprobs_rounded"  # for which there is other evidence
        share = 0.5 if named or (before > NOISE and not score.fitted) else 0.25
        if not left <= min(NOISE, share * before):
            return False
        telling = int((trial.counted & (trial.new < -1e-2) & trial.old.isfinite()).sum())
        if left <= EXACT:
            return telling >= (8 if score.fitted else 4)
        return telling >= (16 if before > NOISE and not score.fitted else 48)

    def _score(self, trial: Trial) -> MismatchCandidate:
        batch = self.batch
        use = trial.counted & trial.new.isfinite() & trial.old.isfinite()
        r = torch.where(use, trial.new - trial.old, 0.0).nan_to_num(0.0).clamp(-MOST, MOST)
        tokens, counted = int(use.sum()), int(trial.counted.sum())
        lengths = batch.per_sequence(use.double()).round()
        held = lengths > 0
        ratio = (batch.per_sequence(r) / lengths.clamp(min=1))[held]
        clipped = (ratio > math.log1p(GSPO.eps_high)) | (ratio < math.log1p(-GSPO.eps_low))
        some = tokens > 0
        return MismatchCandidate(
            trial.name,
            float(r.abs().sum()) / tokens if some else math.inf if counted else 0.0,
            float(r.abs().max()) if some else 0.0,
            math.sqrt(float(r.square().sum()) / tokens) if some else 0.0,
            float(ratio.square().mean().sqrt()) if some else 0.0,
            float(clipped.double().mean()) if some else 0.0,
            tokens,
            counted - tokens,
            trial.fitted,
            trial.text,
            trial.fix,
        )


def _distance(score: MismatchCandidate) -> float:
    """The mean difference, with the most for each token that has nothing to compare."""
    if score.tokens == 0:
        return MOST if score.missing else 0.0
    return (score.mean * score.tokens + MOST * score.missing) / (score.tokens + score.missing)


def _conclude(
    batch: Batch, new: Tensor, distribution: Distribution | None, scores: _Scores, winner: MismatchCandidate | None
) -> MismatchDiagnosis:
    given, others = scores.given, dict[str, MismatchCandidate]()
    for score, _ in scores.found:  # of each name the nearest
        known = others.get(score.name)
        compared = score.tokens or score.missing
        if compared and (known is None or _distance(score) < _distance(known)):
            others[score.name] = score
    if winner is not None:
        others[winner.name] = winner
    candidates = (given, *sorted(others.values(), key=_distance))
    facts = text.facts_of(batch, new, NOISE)
    agrees, cause, fix = False, None, ""
    if winner is not None:
        cause, said, fix = winner.name, winner.text, winner.fix
    elif facts.tokens == 0:
        agrees, said = not given.missing, text.NOTHING
    elif scores.given_is_equal:
        agrees, said = True, text.EQUAL
    elif _distance(given) <= NOISE and not facts.is_one_sided:
        agrees, said = True, text.NOISE
    elif facts.looks_stale and not given.missing:
        cause, said, fix = "stale_weights", text.STALE, text.STALE_FIX
    else:
        said = text.UNKNOWN
    notes = list(text.notes_of(batch, new, winner or given, given, agrees or winner is not None, facts))
    if agrees and facts.tokens and distribution is not None and distribution.kept is None:
        sample = Sample(distribution, _rows_to_sample(batch))
        notes += text.note_of_sampling(sample.likeliest_temperature(batch.mask), sample.given)
    untried: tuple[str, ...] = () if distribution is not None else text.NEEDS_LOGITS
    if distribution is not None and distribution.kept is not None and not scores.given_is_equal:
        untried = text.NEEDS_NO_KEPT
    return MismatchDiagnosis(
        agrees, cause, said, fix, candidates, tuple(notes), untried, facts.tokens, facts.sequences
    )  # fmt: skip
