"""slime's hook over real processes, on logits as Megatron has them, against plain float64 on the whole batch.

Megatron's groups are a stand-in here; tests/trainers/test_slime.py has its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import ranks
import torch
import torch.nn.functional as F
from checks import check_number
from modes import DEFAULT_MODE
from slime_ranks import CASES, PADDING, SAMPLES, VOCAB, args, check_shares, reducer, stand_ins, stubbed_share, whole
from torch import Tensor

from gspo_kernels.integrations import slime

pytestmark = DEFAULT_MODE


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("tp", "cp"), [pytest.param(t, c, marks=ranks.mark) for t, c in [(1, 1), (2, 1), (1, 2), (2, 2)]]
)
def test_shares_of_all_ranks_are_the_whole(tp: int, cp: int, case: str) -> None:
    check_shares(ranks.run(tp * cp, stubbed_share, tp, cp, CASES[case]), tp, cp, CASES[case])


def test_on_policy_without_old_log_probs() -> None:
    """slime has none where the policy is the one that sampled: all ratios are 1, and nothing is clipped."""
    batch = {k: x for k, x in whole().items() if k != "log_probs"}
    leaf = F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None].requires_grad_()
    opt = args(use_kl_loss=False, entropy_coef=0.0, recompute_loss_function=True)
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)):
        loss, log = slime.policy_loss(opt, batch, leaf, reducer(batch, 0, 1, opt, None))
    reference = sum(
        -(a * m).sum() / m.sum().clamp(min=1) for a, m in zip(batch["advantages"], batch["loss_masks"], strict=True)
    )
    check_number("loss", float(loss.detach()), float(reference), 1e-6)
    assert float(log["pg_clipfrac"]) == 0 and float(log["ppo_kl"]) == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [*((name, True) for name in slime.REFUSED), ("advantage_estimator", "cispo")],
)
def test_refusals_name_the_option(option: str, value: Any) -> None:
    refused = pytest.raises(NotImplementedError, match=rf"^{option}: expected")
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused:
        slime.policy_loss(args(**{option: value}), whole(), torch.zeros(1, 1, VOCAB), torch.sum)


def test_a_wrong_clip_range_has_its_option_name() -> None:
    refused = pytest.raises(ValueError, match=r"^eps_clip_c: expected")
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused:
        slime.policy_loss(
            args(eps_clip_c=0.5), whole(), F.pad(torch.cat(whole()["logits"]), (0, 0, 0, PADDING))[None], torch.sum
        )


def hook(batch: dict[str, Any]) -> Callable[[], tuple[Tensor, dict[str, Tensor]]]:
    """The hook on one rank, with all terms."""
    opt = args(recompute_loss_function=True, rollout_top_p=0.9 if "rollout_top_p_token_ids" in batch else 1.0)
    leaf = F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None]
    return partial(slime.policy_loss, opt, batch, leaf, reducer(batch, 0, 1, opt, None))


def test_kept_sets_are_needed_and_fit() -> None:
    opt = args(rollout_top_p=0.9)
    short = whole(kept=True)
    short["rollout_top_p_token_offsets"][1] = short["rollout_top_p_token_offsets"][1][:-1]
    for batch, name in ((whole(), "ids"), (short, r'offsets"\]\[1\]')):
        refused = pytest.raises(ValueError, match=rf'^batch\["rollout_top_p_token_{name}.*expected')
        with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused:
            slime.policy_loss(opt, batch, F.pad(torch.cat(batch["logits"]), (0, 0, 0, PADDING))[None], torch.sum)


@pytest.mark.parametrize("name", ["advantages", "log_probs", "ref_log_probs"])
def test_rounded_arrays_are_refused(name: str) -> None:
    """The hook casts all samples to one dtype, which must not hide that they were rounded before."""
    batch = whole()
    batch[name] = [x.bfloat16() for x in batch[name]]
    refused = pytest.raises(TypeError, match=rf'^batch\["{name}"\]: expected float32')
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), refused as error:
        hook(batch)()
    assert "cast_forward_inputs=False" in str(error.value)


def test_float64_arrays_keep_their_digits() -> None:
    """Advantages and log-probabilities reach the loss unrounded; one sample in float64 makes all float64."""
    batch = whole()
    batch["advantages"][0] = batch["advantages"][0].double() + 1e-12
    batch["log_probs"] = [x.double() - 1e-12 for x in batch["log_probs"]]
    spy = mock.patch.object(slime, "policy_loss_from_logprobs", wraps=slime.policy_loss_from_logprobs)
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)), spy as loss:
        hook(batch)()
    _, advantages, old_logprobs = loss.call_args.args
    rows = [first + prompt - 1 + i for first, prompt, response in starts() for i in range(response)]
    assert torch.equal(advantages[0, rows], torch.cat([x.double() for x in batch["advantages"]]))
    assert torch.equal(old_logprobs[rows], torch.cat(batch["log_probs"]))


def starts() -> list[tuple[int, int, int]]:
    """(first row, prompt, response) of each sample on one rank."""
    ends = itertools.accumulate((p + r for p, r in SAMPLES), initial=0)
    return [(first, p, r) for first, (p, r) in zip(ends, SAMPLES, strict=False)]


@pytest.mark.parametrize("kept", [False, True])
def test_the_default_device_does_not_matter(kept: bool) -> None:
    loss_of = hook(whole(kept=kept))
    with mock.patch.dict(sys.modules, stand_ins(1, 1, (None, None), 0)):
        loss, log = loss_of()
        with torch.device("meta"):
            other, _ = loss_of()
    assert torch.equal(other, loss) and all(bool(x.isfinite()) for x in log.values())
