"""NaN in one number: the loss is NaN, so are the rows that share a ratio with it, and all others are as without it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import ranks
import torch
import torch.distributed as dist
from linear import Separate, chunk_of
from modes import BACKENDS, DEFAULT_MODE, INTERPRETED, on_device
from torch import Tensor

from gspo_kernels import (
    CISPO,
    DPPO,
    GRPO,
    GSPO,
    GSPOToken,
    Objective,
    TopEntropy,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logprobs,
)
from gspo_kernels.linear import operators

SEQUENCES, LENGTH, VOCAB, WIDTH = 5, 4, 20, 8
AT = torch.tensor([1, 2, 3]), torch.tensor([1, 0, 2])  # NaN, in sequences; the second has advantage 0
MASKED = (3, 3)
WHERE = ["old", "ref", "logit", "logit on-policy"]
OBJECTIVES: list[Objective] = [GSPO(0.2, 0.2), GSPOToken(0.2, 0.2), GRPO()]


@dataclass
class Given:
    hidden: Tensor  # [B, T, D]
    weight: Tensor  # [V, D]
    token_ids: Tensor
    mask: Tensor
    advantages: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None = None

    @classmethod
    def of(cls, where: str, spoilt: bool) -> Given:
        """`where`: which numbers hold the NaN, if `spoilt`."""
        generator = torch.Generator().manual_seed(3)
        shape = (SEQUENCES, LENGTH)
        hidden = torch.randn(*shape, WIDTH, generator=generator)
        weight = torch.randn(VOCAB, WIDTH, generator=generator)
        token_ids = torch.randint(VOCAB, shape, generator=generator)
        logprobs = (hidden @ weight.t()).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
        mask = torch.ones(shape, dtype=torch.bool)
        mask[MASKED] = False
        advantages = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5])
        old, ref, rollout = (logprobs + 0.05 * torch.randn(shape, generator=generator) for _ in range(3))
        if spoilt:
            {"old": old, "ref": ref, "rollout": rollout}.get(where, hidden)[AT] = math.nan
        on_policy = where == "logit on-policy"
        return cls(
            hidden, weight, token_ids, mask, advantages, None if on_policy else old, ref if where == "ref" else None,
            rollout if where == "rollout" else None,
        )  # fmt: skip

    @property
    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = {"mask": on_device(self.mask)}
        if self.ref_logprobs is not None:
            found |= {"ref_logprobs": on_device(self.ref_logprobs), "beta": 0.1}
        if self.rollout_logprobs is not None:
            found["rollout_logprobs"] = on_device(self.rollout_logprobs)
        return found

    @property
    def arrays(self) -> list[Tensor | None]:
        return [None if x is None else on_device(x) for x in (self.token_ids, self.advantages, self.old_logprobs)]


Path = Callable[[Given, Objective], tuple[Tensor, Tensor]]  # -> loss, gradient per row [B, T, ...]


def from_logits(backend: str, **options: Any) -> Path:
    def path(given: Given, objective: Objective) -> tuple[Tensor, Tensor]:
        leaf = on_device(given.hidden @ given.weight.t()).requires_grad_()
        loss, _ = policy_loss(leaf * 1, *given.arrays, objective=objective, backend=backend, **given.options, **options)
        return loss, torch.autograd.grad(loss * 0.5, leaf)[0]

    return path


def from_hidden(rows: int | None, frozen: bool = False) -> Path:
    def path(given: Given, objective: Objective) -> tuple[Tensor, Tensor]:
        leaf, weight = (on_device(x).detach().requires_grad_() for x in (given.hidden, given.weight))
        loss, _ = linear_policy_loss(
            leaf, weight.requires_grad_(not frozen), *given.arrays, objective=objective,
            chunk_bytes=chunk_of(rows, VOCAB), **given.options,
        )  # fmt: skip
        (loss * 0.5).backward()
        assert leaf.grad is not None
        if not frozen:
            assert weight.grad is not None and bool(weight.grad.isnan().all()) == bool(loss.isnan()), "a sum over rows"
        return loss, leaf.grad

    return path


def from_separate(given: Given, objective: Objective) -> tuple[Tensor, Tensor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "Head", Separate)
        return from_hidden(4)(given, objective)


def from_logprobs(layout: str) -> Path:
    def path(given: Given, objective: Objective) -> tuple[Tensor, Tensor]:
        logits = given.hidden @ given.weight.t()
        leaf = on_device(logits.log_softmax(-1).gather(-1, given.token_ids[..., None])[..., 0]).requires_grad_()
        _, advantages, old = given.arrays
        options = given.options
        if layout == "padded":
            loss, _ = policy_loss_from_logprobs(leaf, advantages, old, objective=objective, **options)
        else:
            options = {name: x.reshape(-1) if isinstance(x, Tensor) else x for name, x in options.items()}
            boundaries = on_device(torch.arange(SEQUENCES + 1) * LENGTH)
            loss, _ = policy_loss_from_logprobs(
                leaf.reshape(-1), advantages, None if old is None else old.reshape(-1), objective=objective,
                cu_seqlens=boundaries, **options,
            )  # fmt: skip
        return loss, torch.autograd.grad(loss * 0.5, leaf)[0][..., None]

    return path


PATHS: dict[str, Path] = {
    **{backend: from_logits(backend) for backend in BACKENDS},
    **{f"{backend}, overwriting": from_logits(backend, overwrite_logits=True) for backend in BACKENDS},
    "hidden, single pass": from_hidden(None),
    "hidden, recompute": from_hidden(2),
    "hidden, frozen head": from_hidden(None, frozen=True),
    "hidden, frozen head, chunks": from_hidden(2, frozen=True),
    "hidden, beside the logits": from_separate,
    "log-probabilities, padded": from_logprobs("padded"),
    "log-probabilities, packed": from_logprobs("packed"),
}
if INTERPRETED:  # others have no kernel that these have not
    PATHS = {
        name: PATHS[name] for name in ("triton", "triton, overwriting", "hidden, single pass", "hidden, recompute")
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda x: type(x).__name__)
def test_the_rows_of_its_ratio_are_nan_and_all_others_what_they_were(
    path: str, where: str, objective: Objective
) -> None:
    clean, gradient = (x.detach().cpu() for x in PATHS[path](Given.of(where, False), objective))
    loss, found = (x.detach().cpu() for x in PATHS[path](Given.of(where, True), objective))
    check(objective, clean, gradient, loss, found, slice(None))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_the_engine_s(path: str, divergence: Literal["tv", "kl"]) -> None:
    """Of NaN no comparison is true, but DPPO does not keep such a token as if it had not moved."""
    objective = DPPO(divergence=divergence)
    clean, gradient = (x.detach().cpu() for x in PATHS[path](Given.of("rollout", False), objective))
    loss, found = (x.detach().cpu() for x in PATHS[path](Given.of("rollout", True), objective))
    check(objective, clean, gradient, loss, found, slice(None))


@pytest.mark.parametrize("where", ["old", "logit", "logit on-policy"])
def test_a_token_that_is_left_out_for_its_entropy(where: str) -> None:
    """Its loss is NaN as well, as with the objective alone; the quantile is that of all other tokens."""
    for path in (PATHS[name] for name in PATHS if name.startswith("hidden, ")):
        loss, found = path(Given.of(where, True), TopEntropy(CISPO(), share=0.01))
        rows = found.isnan().any(-1).cpu()
        assert loss.isnan() and rows[AT].all() and rows.sum() == len(AT[0])
        if where != "old":  # else the token of the highest entropy is one of them
            assert (found.nan_to_num() != 0).any(), "the token of the highest of all other entropies"


def check(objective: Objective, clean: Tensor, gradient: Tensor, loss: Tensor, found: Tensor, tokens: slice) -> None:
    """`tokens` of each sequence, in which the gradients [B, T, ...] are."""
    expected = torch.zeros(SEQUENCES, LENGTH, dtype=torch.bool)
    if isinstance(objective, (GRPO, DPPO)):
        expected[AT] = True
    else:
        expected[AT[0]] = True
        expected[MASKED] = False
    expected = expected[:, tokens]
    assert not clean.isnan() and not gradient.isnan().any()
    assert loss.isnan() and torch.equal(found.isnan(), expected[..., None].expand(found.shape))
    assert torch.equal(found[~expected], gradient[~expected])


def on_ranks(rank: int) -> list[tuple[Tensor, Tensor]]:
    """In one of 2 x 2 ranks: loss and gradient of every case without NaN and with, from logits and hidden states."""
    tp, cp = ranks.grid(rank, 2, 2)
    tokens, columns = _tokens_of(rank), slice(10 * (rank % 2), 10 * (rank % 2) + 10)
    found = []
    for objective, where, spoilt in itertools.product(OBJECTIVES, WHERE, (False, True)):
        given = Given.of(where, spoilt)
        arrays = (given.token_ids, given.old_logprobs, given.mask, given.ref_logprobs)
        token_ids, old, mask, ref = (None if x is None else x[:, tokens] for x in arrays)
        options = {
            "mask": mask, "ref_logprobs": ref, "beta": 0.0 if ref is None else 0.1, "objective": objective,
            "tp_group": tp, "cp_group": cp,
        }  # fmt: skip
        hidden = given.hidden[:, tokens]
        logits = (hidden @ given.weight[columns].t()).requires_grad_()
        loss, _ = policy_loss(logits, token_ids, given.advantages, old, **options)
        loss.backward()
        found.append((loss, logits.grad))
        leaf, weight = hidden.clone().requires_grad_(), given.weight[columns].clone().requires_grad_()
        loss, _ = linear_policy_loss(leaf, weight, token_ids, given.advantages, old, **options)
        loss.backward()
        found.append((loss, leaf.grad))
    return found


def _tokens_of(rank: int) -> slice:
    return slice(2 * (rank // 2), 2 * (rank // 2) + 2)


@DEFAULT_MODE
@pytest.mark.plain_memory
@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo")
def test_on_every_rank() -> None:
    """What is NaN on one rank of a context-parallel or tensor-parallel group spoils the same rows on the others."""
    for rank, found in enumerate(ranks.run(4, on_ranks)):
        cases = iter(found)
        for objective, _ in itertools.product(OBJECTIVES, WHERE):
            clean, clean_hidden, spoilt, spoilt_hidden = (next(cases) for _ in range(4))
            check(objective, *clean, *spoilt, _tokens_of(rank))
            check(objective, *clean_hidden, *spoilt_hidden, _tokens_of(rank))
