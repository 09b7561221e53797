"""The suggested clip range, against counts in plain Python and against the losses that clip with it."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from modes import NOT_INTERPRETED, on_device
from torch import Tensor

import gspo_kernels
from gspo_kernels import ClipRange, policy_loss_from_logprobs

pytestmark = NOT_INTERPRETED

S, T, SHARE = 120, 9, 0.15
KINDS = ("sequence", "token")


def batch(seed: int = 0, responses: int = S) -> dict[str, Tensor]:
    """Ragged responses, some of them empty, some of advantage 0; NaN where masked."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, T + 1, (responses, 1), generator=generator)
    lengths[::10] = 0
    mask = torch.arange(T) < lengths
    mask[:, 1] &= torch.rand(responses, generator=generator) < 0.8  # the output of a tool
    log_ratio = 0.01 + 0.05 * torch.randn(responses, T, generator=generator)
    advantages = torch.randn(responses, generator=generator)
    advantages[1::8] = 0.0
    by_token = torch.randn(responses, T, generator=generator)
    return {
        "log_ratio": log_ratio.masked_fill(~mask, math.nan),
        "mask": mask,
        "advantages": advantages,
        "by_token": by_token.masked_fill(~mask, math.nan),
    }


def suggest(log_ratio: Any, advantages: Any, share: float = SHARE, **options: Any) -> ClipRange:
    """The package's function, on the device of this mode."""

    def moved(x: Any) -> Any:
        return [on_device(y) for y in x] if isinstance(x, list) else on_device(x) if isinstance(x, Tensor) else x

    given = {name: moved(x) if name in ("mask", "cu_seqlens") else x for name, x in options.items()}
    return gspo_kernels.suggest_clip_range(moved(log_ratio), moved(advantages), share, **given)


def packed(given: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A token array without its masked tokens, and the boundaries."""
    mask = given["mask"]
    return given[name][mask], torch.cat([torch.zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])


def means(given: dict[str, Tensor]) -> Tensor:
    """[S] float64, as GSPO's log-ratio; 0 for an empty response."""
    mask = given["mask"]
    return torch.where(mask, given["log_ratio"].double(), 0.0).sum(1) / mask.sum(1).clamp(min=1)


# --- by hand ----------------------------------------------------------------------------------------------------------


def quantile(values: Sequence[float], q: float) -> float:
    """Between the order statistics around position q (n - 1)."""
    position, ordered = q * (len(values) - 1), sorted(values)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def by_hand(
    given: dict[str, Tensor], kind: str, share: float, by_token: bool = False, wrong: str = ""
) -> tuple[float, float]:
    """The two bounds by plain Python; with `wrong`, those of somebody who made that mistake."""
    found = {}
    for sign in (-1, 1):
        reach = []
        for i, (row, mask) in enumerate(zip(given["log_ratio"].tolist(), given["mask"].tolist(), strict=True)):
            counted = [t for t in range(T) if mask[t]]
            if wrong == "masked tokens count as ratios of 1":
                row, counted = [x if m else 0.0 for x, m in zip(row, mask, strict=True)], list(range(T))
            values = given["by_token"][i].tolist() if by_token else [float(given["advantages"][i])] * T
            side = -sign if wrong == "sides exchanged" else sign
            mine = [t for t in counted if side * values[t] > 0]
            if wrong == "advantages of 0 count":
                mine = [t for t in counted if side * values[t] >= 0]
            if not mine:
                if wrong == "empty responses count" and not counted and side * values[0] > 0:
                    reach.append(0.0)
                continue
            if kind == "token":
                tokens = counted if wrong == "tokens of the other sign count" else mine
                reach.append(max(sign * row[t] for t in tokens))
                if wrong == "each token counts":
                    reach[-1:] = [sign * row[t] for t in mine]
            else:
                total = sum(row[t] for t in counted)
                reach.append(sign * total / (1 if wrong == "the sum of a response" else len(counted)))
        q = 1 - share / 2 if wrong == "half of the share on each side" else 1 - share
        bound = quantile(reach, q)
        found[sign] = bound if wrong == "a range of the log-ratio" else sign * math.expm1(sign * bound)
    return found[-1], found[1]


@pytest.mark.parametrize("share", [0.15, 0.01, 0.3])
@pytest.mark.parametrize("packs", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("by_token", [False, True])
def test_the_bounds_are_those_by_hand(kind: str, packs: bool, by_token: bool, share: float) -> None:
    given = batch()
    name = "by_token" if by_token else "advantages"
    arrays: dict[str, Any] = {"log_ratio": given["log_ratio"], "advantages": given[name], "mask": given["mask"]}
    if packs:
        arrays = dict(zip(("log_ratio", "cu_seqlens"), packed(given, "log_ratio"), strict=True))
        arrays["advantages"] = packed(given, name)[0] if by_token else given[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if share < 0.1 else "error")
        found = suggest(**arrays, share=share, ratio_of=kind)
    low, high = by_hand(given, kind, share, by_token)
    near: dict[str, Any] = {"rel": 1e-12, "abs": 1e-15}
    assert found.eps_low == pytest.approx(low, **near) and found.eps_high == pytest.approx(high, **near)
    assert (found.ratio_of, found.share, found.kept_low, found.kept_high) == (kind, share, False, False)
    signs = torch.where(given["mask"], given["by_token"] if by_token else given["advantages"][:, None], 0.0)
    assert (found.responses_low, found.responses_high) == ((signs < 0).any(1).sum(), (signs > 0).any(1).sum())


WRONG = {
    "masked tokens count as ratios of 1": KINDS, "sides exchanged": KINDS, "advantages of 0 count": KINDS,
    "half of the share on each side": KINDS, "a range of the log-ratio": KINDS, "empty responses count": ("sequence",),
    "the sum of a response": ("sequence",), "tokens of the other sign count": ("token",),
    "each token counts": ("token",),
}  # fmt: skip


@pytest.mark.parametrize(("wrong", "kind"), [(wrong, kind) for wrong, kinds in WRONG.items() for kind in kinds])
def test_a_mutant_has_other_bounds(wrong: str, kind: str) -> None:
    given = batch()
    for by_token in (False, True):
        right, mutant = by_hand(given, kind, SHARE, by_token), by_hand(given, kind, SHARE, by_token, wrong)
        if right != pytest.approx(mutant, rel=1e-6):
            return
    pytest.fail("the batch does not show this mistake")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["GSPO", "GSPOToken", "GRPO", "PPO"])
def test_the_losses_clip_the_share_up_to_one_response(name: str, seed: int) -> None:
    given = batch(seed)
    mask, old = on_device(given["mask"]), on_device(torch.full((S, T), -2.0))
    logprobs = old + on_device(given["log_ratio"])
    by_token = name in ("GSPOToken", "PPO")
    advantages = on_device(given["by_token" if by_token else "advantages"])
    objective = getattr(gspo_kernels, name)()

    def stats_of(objective: gspo_kernels.Objective) -> gspo_kernels.Stats:
        return policy_loss_from_logprobs(logprobs, advantages, old, objective=objective, mask=mask).stats

    log_ratio = stats_of(objective).log_ratio
    found = gspo_kernels.suggest_clip_range(log_ratio, advantages, SHARE, mask=mask)
    stats = stats_of(replace(objective, eps_low=found.eps_low, eps_high=found.eps_high))
    for clipped, count in ((stats.clipped_low, found.responses_low), (stats.clipped_high, found.responses_high)):
        of_responses = clipped if clipped.ndim == 1 else clipped.any(1)
        assert abs(int(of_responses.sum()) - SHARE * count) <= 1
    if name == "GSPO":
        some = int((given["advantages"] != 0).logical_and(given["mask"].any(1)).sum())
        assert float(stats.clip_fraction * stats.num_sequences) == pytest.approx(SHARE * some, abs=2)


def test_log_ratios_of_sequences_are_means_of_tokens() -> None:
    given = batch()
    expected = suggest(given["log_ratio"], given["advantages"], mask=given["mask"], ratio_of="sequence", noise=0.001)
    _, cu_seqlens = packed(given, "log_ratio")
    cut = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool)
    for options in ({"mask": given["mask"]}, {"cu_seqlens": cu_seqlens}, {"cu_seqlens": cu_seqlens, "mask": cut}):
        found = suggest(means(given), given["advantages"], noise=0.001, **options)
        assert found == expected, options
    columns = means(given)[:, None], given["advantages"][:, None]
    assert suggest(*columns, cu_seqlens=cu_seqlens, noise=0.001) == expected
    with_empty = suggest(means(given), given["advantages"])
    assert with_empty.responses_low > expected.responses_low, "nothing says which responses are empty"


def test_the_loss_of_current_says_what_the_range_is_for() -> None:
    """As its name does: GSPO's range is one of sequences, also with log-ratios of tokens."""
    given = batch()
    arrays = {"log_ratio": given["log_ratio"], "advantages": given["advantages"], "mask": given["mask"], "noise": 0.001}
    by_sequence, by_token = (suggest(**arrays, ratio_of=kind) for kind in KINDS)
    for name, expected in {"GSPO": by_sequence, "GSPOToken": by_sequence, "GRPO": by_token, "PPO": by_token}.items():
        assert suggest(**arrays, current=getattr(gspo_kernels, name)()) == expected, name
    assert suggest(**arrays, current=by_sequence) == by_sequence


def test_a_column_of_sequences_is_not_one_of_tokens() -> None:
    """[S, 1], as TRL has the log-ratios of sequences, beside a mask of [S, T]."""
    given = batch()
    expected = suggest(means(given), given["advantages"], mask=given["mask"])
    assert suggest(means(given)[:, None], given["advantages"], mask=given["mask"]) == expected


def test_a_packed_update_of_responses_of_one_token() -> None:
    """It could have one log-ratio per token or per sequence; the other updates, or `ratio_of`, say which."""
    given = batch()
    whole, cu_seqlens = packed(given, "log_ratio")
    short, ones = whole[:8], torch.ones(8)
    log_ratios, advantages = [short, whole], [ones, given["advantages"]]
    found = suggest(log_ratios, advantages, cu_seqlens=[torch.arange(9), cu_seqlens])
    assert found == suggest([short[:, None], given["log_ratio"]], advantages, mask=[ones[:, None], given["mask"]])
    assert suggest(short, ones, cu_seqlens=torch.arange(9), ratio_of="token", current=(0.1, 0.1)) == suggest(
        short[:, None], ones, current=(0.1, 0.1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_updates_is_all_their_responses(kind: str) -> None:
    """Also of different widths, and with updates without a response."""
    given = batch()
    rows = [slice(0, 50), slice(50, 50), slice(50, S)]
    widths = [T, 3, max(1, int(given["mask"][50:].sum(1).max()))]
    parts = {
        name: [x[row, :w] if x.ndim == 2 else x[row] for row, w in zip(rows, widths, strict=True)]
        for name, x in given.items()
    }
    expected = suggest(given["log_ratio"], given["advantages"], mask=given["mask"], ratio_of=kind)
    assert suggest(parts["log_ratio"], parts["advantages"], mask=parts["mask"], ratio_of=kind) == expected


# --- sides that say nothing -------------------------------------------------------------------------------------------

ROW = torch.linspace(-0.4, 0.3, 40)
SILENT: dict[str, tuple[Tensor, Tensor, str, str]] = {  # log-ratios, advantages, which side, why
    "no response": (ROW, torch.ones(40), "low", "there are no responses with a negative advantage"),
    "on-policy": (torch.zeros(40), torch.ones(40), "high", "0 of the 40 .* have a ratio above 1, too few"),
    "the other way": (ROW.abs() + 0.1, -torch.ones(40), "low", "have a ratio below 1"),
    "saturated": (torch.full((40,), 25.0), torch.ones(40), "high", r"at least exp\(20\).*old_logprobs"),
    "infinite": (torch.full((40,), math.inf), torch.ones(40), "high", r"40 of the 40 .* at least exp\(20\)"),
    "ratios of 0": (torch.full((40,), -math.inf), -torch.ones(40), "low", r"40 of the 40 .* at most exp\(-20\)"),
    "two ratios": (torch.tensor([-1.0, 0.1]), torch.ones(2), "high", "1 of the 2 responses"),
    "nothing": (torch.zeros(0), torch.zeros(0), "high", "there are no responses with a positive advantage"),
}


@pytest.mark.parametrize("case", SILENT)
def test_the_current_range_is_kept_on_a_side_that_says_nothing(case: str) -> None:
    log_ratio, advantages, side, why = SILENT[case]
    for current in (gspo_kernels.GSPO(), (3e-4, 4e-4), ClipRange(3e-4, 4e-4, "sequence", 0.1, 1, 1, True, True)):
        found = suggest(log_ratio, advantages, current=current)
        assert getattr(found, f"kept_{side}") and getattr(found, f"eps_{side}") == {"low": 3e-4, "high": 4e-4}[side]
    other = gspo_kernels.suggest_clip_range
    both = torch.cat([log_ratio, ROW]), torch.cat([advantages, torch.full((40,), -1.0 if side == "high" else 1.0)])
    with pytest.raises(ValueError, match=rf"^current: expected .* determines eps_{side}: .*{why}.*; got None"):
        other(*map(on_device, both))


def test_saturated_ratios_count_as_the_losses_count_them() -> None:
    """At exp(20): between the others and a bound that more than `share` of them reach."""
    log_ratio = torch.tensor([0.1, 0.2, 0.3, 30.0, math.inf, -math.inf])
    advantages = torch.ones(6)
    found = suggest(log_ratio, advantages, 0.5, current=(0.2, 0.2))
    assert found.eps_high == pytest.approx(math.expm1(0.25), rel=1e-6)
    with pytest.warns(UserWarning, match="100 responses"):
        below = suggest(log_ratio, -advantages, 0.01, current=(0.2, 0.2))
    assert 0.99 < below.eps_low < 1.0, "a ratio of 0 is below the bound"


def test_more_responses_than_a_quantile_of_torch_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def limited(values: Tensor, q: float) -> Tensor:
        raise RuntimeError("quantile() input tensor is too large")  # as torch above 2**24 numbers

    expected = torch.quantile(ROW.double(), 0.85)
    monkeypatch.setattr(torch, "quantile", limited)
    found = suggest(ROW, torch.ones(40), current=(0.1, 0.1))
    assert found.eps_high == float(expected.expm1())


# --- noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_share_of_noise_is_that_of_random_errors(kind: str) -> None:
    """Errors of mean -noise**2 / 2, whose exponential has a mean of 1, in responses of two lengths."""
    noise, draws = 0.3, 4000
    mask = torch.arange(20) < torch.tensor([[5], [20]]).repeat(draws // 2, 1)
    log_ratio = -(noise**2) / 2 + noise * torch.randn(draws, 20, generator=torch.Generator().manual_seed(0))
    advantages = torch.ones(draws)
    advantages[: draws // 2] = -1
    share = 0.3
    with pytest.warns(
        UserWarning, match=r"^noise: expected .*share of 0\.3; got 0\.3 nats per token, which clip .*low"
    ):
        found = suggest(log_ratio, advantages, share, mask=mask, ratio_of=kind, noise=noise)
    assert found.noise_low == pytest.approx(share, abs=0.03) and found.noise_high == pytest.approx(share, abs=0.03)
    tensor = torch.tensor(noise)
    with pytest.warns(UserWarning, match="noise"):
        again = suggest(log_ratio, advantages, share, mask=mask, ratio_of=kind, noise=on_device(tensor))
    assert again.noise_low == pytest.approx(found.noise_low, rel=1e-6)


def test_small_noise_does_not_warn_and_lengths_matter() -> None:
    mask = torch.ones(40, 16, dtype=torch.bool)
    log_ratio, advantages = ROW, torch.tensor([1.0, -1.0]).repeat(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = suggest(log_ratio, advantages, mask=mask, noise=0.4)
        assert suggest(log_ratio, advantages, mask=mask, noise=0.0).noise_low == 0.0
        assert suggest(log_ratio, advantages, noise=None).noise_low is None
    normal = statistics.NormalDist(-(0.4**2) / 2, 0.4 / 4)
    assert found.noise_low == pytest.approx(normal.cdf(math.log1p(-found.eps_low)), rel=1e-9)
    assert found.noise_high == pytest.approx(1 - normal.cdf(math.log1p(found.eps_high)), rel=1e-6)


def test_few_responses_are_said() -> None:
    with pytest.warns(UserWarning, match=r"^advantages: expected at least 7 .* positive .*0\.15; got 6") as caught:
        suggest(torch.linspace(0.1, 0.2, 6), torch.ones(6), current=(0.1, 0.1))
    assert [each.filename for each in caught] == [__file__], "it points to the caller"


def rows_of(given: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
    return given["log_ratio"][rows], given["advantages"][rows]


def on_data_parallel_rank(rank: int, kind: str) -> tuple[ClipRange, list[Any]]:
    """Ranks with 80 responses in two updates, with 40, and without an update; and what all of them refuse."""
    given = batch()
    cuts = [[slice(0, 30), slice(30, 80)], [slice(80, S)], []][rank]
    arrays: dict[str, Any] = {
        "log_ratio": [given["log_ratio"][cut] for cut in cuts],
        "advantages": [given["advantages"][cut] for cut in cuts],
        "mask": [given["mask"][cut] for cut in cuts],
    }
    if kind == "sequence":
        arrays["log_ratio"] = [means(given)[cut] for cut in cuts]
    found = gspo_kernels.suggest_clip_range(**arrays, group=dist.group.WORLD, noise=[0.001, 0.002, None][rank])

    def refused(**change: Any) -> ranks.Refused | None:
        return ranks.refused(lambda: gspo_kernels.suggest_clip_range(**{**arrays, **change}, group=dist.group.WORLD))

    broken = [torch.full_like(x, math.nan) for x in arrays["log_ratio"]] if rank == 1 else arrays["log_ratio"]
    return found, [refused(share=0.1 + 0.1 * (rank == 1)), refused(log_ratio=broken)]


def on_context_parallel_rank(rank: int, kind: str) -> tuple[ClipRange, ranks.Refused | None]:
    """The even columns of a padded batch, or the odd ones; and two packed responses with a token on each rank."""
    given = batch()
    columns = slice(rank, None, 2)
    log_ratio = means(given) if kind == "sequence" else given["log_ratio"][:, columns]
    found = gspo_kernels.suggest_clip_range(
        log_ratio, given["advantages"], mask=given["mask"][:, columns], noise=0.001, cp_group=dist.group.WORLD
    )
    tokens = torch.tensor([0.1, 0.2])
    either = {"cu_seqlens": torch.tensor([0, 1, 2]), "current": (0.1, 0.1), "cp_group": dist.group.WORLD}
    return found, ranks.refused(lambda: gspo_kernels.suggest_clip_range(tokens, torch.ones(2), **either))


class TestRanks:
    pytestmark = ranks.mark

    @pytest.mark.parametrize("kind", KINDS)
    def test_data_parallel_ranks_get_the_range_of_all_responses(self, kind: str) -> None:
        given = batch()
        found = ranks.run(3, on_data_parallel_rank, kind)
        tokens = [float(given["mask"][rows].sum()) for rows in (slice(0, 80), slice(80, S))]
        noise = math.sqrt((tokens[0] * 0.001**2 + tokens[1] * 0.002**2) / sum(tokens))
        log_ratio = means(given) if kind == "sequence" else given["log_ratio"]
        expected = gspo_kernels.suggest_clip_range(log_ratio, given["advantages"], mask=given["mask"], noise=noise)
        for suggested, _ in found:
            assert replace(suggested, noise_low=None, noise_high=None) == replace(
                expected, noise_low=None, noise_high=None
            )
            assert suggested.noise_low == pytest.approx(expected.noise_low, rel=1e-9, abs=1e-12)
        shares, broken = zip(*(refusals for _, refusals in found), strict=True)
        assert all(each is not None and each.message.startswith("share: expected the same on every") for each in shares)
        assert [each.message.split(":")[0] for each in broken] == ["group", "log_ratio", "group"]

    @pytest.mark.parametrize("kind", KINDS)
    def test_context_parallel_ranks_get_the_range_of_whole_responses(self, kind: str) -> None:
        given = batch()
        log_ratio = means(given) if kind == "sequence" else given["log_ratio"]
        expected = gspo_kernels.suggest_clip_range(log_ratio, given["advantages"], mask=given["mask"], noise=0.001)
        for found, either in ranks.run(2, on_context_parallel_rank, kind):
            assert found == expected
            assert either is not None and either.message.startswith("log_ratio: expected a second dimension")
