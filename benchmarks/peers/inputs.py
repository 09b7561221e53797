"""What all contestants are given: a padded batch, from logits or from hidden states, and what makes one hard."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cases import DTYPES, SEED, uncertainty
from ..exact import EPSILONS


@dataclass(frozen=True)
class Case:
    """A batch of which nothing is hard."""

    start: str  # "logits" or "hidden"
    objective: str
    dtype: str
    vocab: int
    sequences: int
    tokens: int  # of the longest response
    width: int = 0  # of the hidden states

    @property
    def id(self) -> str:
        return f"{self.start}-{self.objective}-{self.dtype}-{self.vocab}"


CASES = (
    *(Case("logits", "gspo", dtype, 151_936, 16, 32) for dtype in DTYPES),
    Case("logits", "grpo", "fp32", 151_936, 16, 32),
    *(Case("hidden", "gspo", dtype, 151_936, 16, 32, 896) for dtype in DTYPES),
)
SMOKE = (
    *(Case("logits", objective, dtype, 1_000, 4, 8) for objective, dtype in (("gspo", "bf16"), ("grpo", "fp32"))),
    Case("hidden", "gspo", "fp32", 1_000, 4, 8, 32),
)
HARD_CASE = {
    "logits": Case("logits", "gspo", "fp32", 1_000, 4, 8),
    "hidden": Case("hidden", "gspo", "fp32", 1_000, 4, 8, 32),
}


@dataclass
class Inputs:
    """`leaves` are what a gradient is asked of: the logits [B, T, V]; or hidden states [B, T, D] and weight [V, D]."""

    objective: str
    pristine: tuple[Tensor, ...]
    leaves: tuple[Tensor, ...]
    token_ids: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]; [B, T] if by token
    loss_counts: bool = True  # False: the paper's loss is infinite here, and any finite one will do

    @property
    def from_logits(self) -> bool:
        return len(self.leaves) == 1

    def restore(self) -> None:
        with torch.no_grad():
            for leaf, values in zip(self.leaves, self.pristine, strict=True):
                leaf.copy_(values)


def build(case: Case, device: str = "cpu") -> Inputs:
    """Off-policy: responses of all lengths, a third of them outside the clip range, none within 2e-5 of its bounds."""
    generator = torch.Generator().manual_seed(SEED)
    b, t = case.sequences, case.tokens
    lengths = torch.linspace(t // 4, t, b).round().long()[torch.randperm(b, generator=generator)]
    mask = torch.arange(t) < lengths[:, None]
    token_ids = torch.randint(case.vocab, (b, t), generator=generator)
    if case.start == "logits":
        logits = torch.randn(b, t, case.vocab, generator=generator) * 2.0
        likely = torch.rand(b, t, 1, generator=generator) * 11.0 + 4.0
        starts = (logits.scatter_(2, token_ids[..., None], likely),)
    else:
        weight = torch.randn(case.vocab, case.width, generator=generator) / math.sqrt(case.width)
        hidden = torch.randn(b, t, case.width, generator=generator)
        starts = (hidden * 1.5 + 6.0 * weight[token_ids], weight)  # the sampled tokens are the likelier ones
    pristine = tuple(values.to(device, DTYPES[case.dtype]) for values in starts)

    low, high = EPSILONS[case.objective]
    shape = (b, 1) if case.objective == "gspo" else (b, t)
    place = torch.rand(shape, generator=generator, dtype=torch.float64) * 3.0 - 1.5  # in half windows
    place = torch.where((place.abs() - 1.0).abs() < 0.07, place * 0.9, place)
    noise = torch.randn(b, t, generator=generator, dtype=torch.float64) * 0.02

    inputs = Inputs(
        objective=case.objective,
        pristine=pristine,
        leaves=tuple(values.clone().requires_grad_() for values in pristine),
        token_ids=token_ids.to(device),
        mask=mask.to(device),
        old_logprobs=torch.zeros(b, t, device=device),
        advantages=torch.linspace(-1.5, 1.5, b)[torch.randperm(b, generator=generator)].to(device),
    )
    exact = torch.zeros(b, t, dtype=torch.float64)
    exact[mask] = logprobs_of(pristine, inputs.token_ids, inputs.mask).cpu()
    if case.objective == "gspo":
        uncertain = torch.where(mask, uncertainty(exact), 0.0)
        excess = (noise * uncertain).sum(1, keepdim=True) / uncertain.sum(1, keepdim=True).clamp(min=1e-9)
        noise = (noise - excess) * uncertain
    else:
        place = torch.where(place * low < exact, place.abs(), place)  # no old log-probability is above 0
        noise = torch.zeros_like(noise)
    log_ratio = torch.where(place < 0, place * low, place * high)
    inputs.old_logprobs = torch.where(mask, exact - log_ratio - noise, 0.0).float().to(device)
    return inputs


def logprobs_of(starts: tuple[Tensor, ...], token_ids: Tensor, mask: Tensor) -> Tensor:
    """[unmasked tokens] in float64, from logits, or from hidden states and weight. Nothing masked is looked at."""
    found = starts[0][mask].double()
    if len(starts) == 2:
        found = found @ starts[1].double().T
    return found.log_softmax(-1).gather(-1, token_ids[mask][:, None])[:, 0]


# --- what makes it hard -----------------------------------------------------------------------------------------------


def _empty_response(inputs: Inputs) -> None:
    inputs.mask[1] = False


def _nothing_at_all(inputs: Inputs) -> None:
    inputs.mask[:] = False


def _overflow(inputs: Inputs, advantage: float) -> None:
    inputs.old_logprobs[0] -= 100.0
    inputs.advantages[0] = advantage


def _overflow_clipped(inputs: Inputs) -> None:
    _overflow(inputs, 1.0)


def _overflow_unclipped(inputs: Inputs) -> None:
    _overflow(inputs, -1.0)
    inputs.loss_counts = False


def _nan_in_padding(inputs: Inputs) -> None:
    inputs.pristine[0][~inputs.mask] = math.nan
    inputs.restore()


def _nan_in_old_padding(inputs: Inputs) -> None:
    inputs.old_logprobs[~inputs.mask] = math.nan


def _forbidden_block(inputs: Inputs) -> None:
    """Of 64 columns, as a filter of the vocabulary leaves it; no sampled token is in it."""
    inputs.pristine[0][..., 200:264] = -math.inf
    inside = (inputs.token_ids >= 200) & (inputs.token_ids < 264)
    inputs.token_ids[inside] = 0
    inputs.restore()
    exact = logprobs_of(inputs.pristine, inputs.token_ids, inputs.mask)
    inputs.old_logprobs[inputs.mask] = (exact - 1e-4).float()


def _advantages_by_token(inputs: Inputs) -> None:
    """GSPO-token: each token's own advantage, of a mean that is not zero."""
    steps = torch.linspace(-1.0, 1.0, inputs.mask.shape[1], device=inputs.mask.device)
    inputs.objective = "gspo_token"
    inputs.advantages = inputs.advantages[:, None] + steps


def _as_it_is(inputs: Inputs) -> None:
    pass


@dataclass(frozen=True)
class Hard:
    title: str
    change: Callable[[Inputs], None]
    vocab: int = 1_000
    starts: tuple[str, ...] = ("logits", "hidden")


HARD = {
    "empty_response": Hard("a response without an unmasked token", _empty_response),
    "nothing_at_all": Hard("no unmasked token in the batch", _nothing_at_all),
    "overflow_clipped": Hard("a log-ratio of 100, advantage above 0", _overflow_clipped),
    "overflow_unclipped": Hard("a log-ratio of 100, advantage below 0", _overflow_unclipped),
    "nan_in_padding": Hard("NaN in the padding's logits or hidden states", _nan_in_padding),
    "nan_in_old_padding": Hard("NaN in the padding's old log-probabilities", _nan_in_old_padding),
    "forbidden_block": Hard("64 columns of -inf", _forbidden_block, starts=("logits",)),
    "advantages_by_token": Hard("advantages by token (GSPO-token)", _advantages_by_token),
    "odd_vocabulary": Hard("V = 1,001", _as_it_is, vocab=1_001),
}


def build_hard(name: str, start: str, device: str = "cpu") -> Inputs:
    inputs = build(dataclasses.replace(HARD_CASE[start], vocab=HARD[name].vocab), device)
    HARD[name].change(inputs)
    return inputs
