"""`diagnose_mismatch`: each mistake made on purpose is named, and right rollouts raise no alarm."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import diagnosis_page  # docs/scripts/diagnosis_page.py
import pytest
import torch
from mistakes import (
    EXACT,
    MISTAKES,
    WITHOUT_LOGITS,
    Arrays,
    B,
    T,
    V,
    diagnosed,
    packed,
    padded,
    recorded,
    sampled,
    without_logits,
)
from modes import DEFAULT_MODE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_kernels import diagnose_mismatch, token_logprobs
from gspo_kernels.rollout.diagnosis import diagnose, distributions
from gspo_kernels.rows import kept_filter

pytestmark = DEFAULT_MODE


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_named(case: str) -> None:
    """Packed, with the noise of bfloat16; padded and exact where that would hide what the mistake does."""
    cause, make = MISTAKES[case]
    noise, layout = (0.0, dict) if case in EXACT else (0.01, packed)
    found = diagnosed(layout(make(sampled(noise))))
    assert found.cause == cause and not found.agrees
    best = next(x for x in found.candidates if x.name == cause)
    assert best.mean < 1e-5 + 1.2 * noise and best.mean < 0.25 * found.given.mean + 20 * (found.given.missing > 0)
    assert found.fix and found.text == best.text


@pytest.mark.parametrize("case", WITHOUT_LOGITS)
def test_log_probabilities_are_enough_for_most(case: str) -> None:
    cause, make = MISTAKES[case]
    found = diagnosed(without_logits(make(sampled())))
    assert found.cause == cause
    assert {"token_ids_shifted", "top_p"} <= set(found.untried)
    assert "Not tried" in str(found)


def test_values_of_packed_responses_without_the_prompts() -> None:
    given = packed(sampled())
    old = torch.zeros_like(given["old_logprobs"])
    old[: int(given["mask"].sum())] = given["old_logprobs"][given["mask"]]
    assert diagnosed(given | {"old_logprobs": old}).cause == "old_logprobs_without_prompts"


def test_padding_on_another_side() -> None:
    """Responses begin in column 8 of one array, as with prompts padded on the left; elsewhere where prompts end."""
    given = sampled()
    old = torch.zeros_like(given["old_logprobs"])
    for row, values, mask in zip(old, given["old_logprobs"], given["mask"], strict=True):
        row[8 : 8 + int(mask.sum())] = values[mask]
    found = diagnosed(given | {"old_logprobs": old})
    assert found.cause == "old_logprobs_elsewhere" and "padding is on the other side" in found.text


# --- no false alarms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 2e-6, 1e-3, 0.03])
@pytest.mark.parametrize("rows", [1, 3, 30])
def test_right_rollouts_raise_no_alarm(noise: float, rows: int) -> None:
    for seed, layout in enumerate((dict, packed)):
        found = diagnosed(layout(sampled(noise, seed=seed, rows=rows)))
        assert found.agrees and found.cause is None and found.fix == "", str(found)


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("case", ["greedy", "holes", "empty", "masked", "one token", "no token", "uniform", "prompts"])
def test_unusual_right_rollouts_raise_no_alarm(case: str, noise: float) -> None:
    given = sampled(noise, scale=12.0 if case == "greedy" else 0.01 if case == "uniform" else 2.0)
    mask = given["mask"]
    if case == "holes":
        given["mask"] = mask & (torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.7)
    elif case == "empty":
        given["mask"] = mask & (torch.arange(B) % 3 > 0)[:, None]
    elif case == "masked":
        given["mask"] = mask & False
    elif case == "one token":
        given["mask"] = mask & (mask.long().cumsum(1) == 1)
    elif case == "no token":
        given = {name: x[:0] for name, x in given.items()}
    elif case == "prompts":  # the trainer's own values for those too
        given["old_logprobs"] = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    found = diagnosed(given)
    assert found.agrees and found.cause is None, str(found)
    assert str(found)


def test_tokens_that_were_sampled_otherwise_are_noted() -> None:
    """The ratios are 1, and hide that raw log-probabilities are of another distribution."""
    given = sampled(temperature=0.5, rows=64)
    raw = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    found = diagnosed(given | {"old_logprobs": raw})
    assert found.agrees and any("look sampled at temperature 0.5" in note for note in found.notes)
    assert not any("look sampled" in note for note in diagnosed(sampled(rows=64)).notes)


def test_missing_log_probabilities_do_not_agree() -> None:
    given = sampled()
    old = given["old_logprobs"].masked_fill(given["mask"].long().cumsum(1) == 3, -9999.0)
    found = diagnosed(given | {"old_logprobs": old})
    assert found.cause == "mask_too_wide" and found.given.missing > 0
    assert any("have no log-probability" in note for note in found.notes)


@pytest.mark.parametrize(("noise", "cause"), [(0.0, "mask_too_wide"), (0.01, "mask_too_wide")])
def test_a_single_missing_log_probability_is_not_noise(noise: float, cause: str) -> None:
    """The loss would be NaN."""
    given = sampled(noise, rows=60)
    one = given["mask"].flatten().nonzero()[100, 0]
    given["old_logprobs"].view(-1)[one] = torch.nan
    found = diagnosed(given)
    assert not found.agrees and found.cause == cause and found.given.missing == 1
    given["old_logprobs"].view(-1)[one] = -1.0
    given["token_ids"].view(-1)[one] = V
    found = diagnosed(given)
    assert not found.agrees and "some tokens in the mask have no log-probability" in str(found)


def test_one_missing_of_a_million_is_not_rounding() -> None:
    logprobs = -torch.rand(1_100_000)
    old, ids = logprobs.clone(), torch.zeros(1_100_000, dtype=torch.int64)
    old[5] = torch.nan
    boundaries = torch.tensor([0, 500_000, 1_100_000])
    assert not diagnose_mismatch(None, ids, old, logprobs=logprobs, cu_seqlens=boundaries).agrees


def test_one_response_of_another_policy_is_not_noise() -> None:
    given = sampled(rows=60)
    row = int(given["mask"].sum(1).argmax())
    given["old_logprobs"][row] = -3 * torch.rand(T, generator=torch.Generator().manual_seed(3))
    found = diagnosed(given)
    assert found.given.mean < 0.05 and not found.agrees
    assert f"The others begin with number {row}" in " ".join(str(found).split())


def test_what_was_not_tried_is_no_evidence_of_stale_weights() -> None:
    given = sampled(temperature=0.6, rows=48)
    found = diagnosed(without_logits(given))
    assert found.cause != "stale_weights" or "Another temperature or other filters" in found.text
    given = sampled(temperature=0.95, rows=48, noise=0.02)
    found = diagnosed(given)
    assert found.cause == "another_temperature" or any("explains a part" in note for note in found.notes)


# --- a rollout engine's own -------------------------------------------------------------------------------------------

ENGINE: list[tuple[str, Arrays, str | None]] = [
    ("right", {}, None),
    ("bf16", {}, None),
    ("t07", {"temperature": 0.7}, None),
    ("t07", {}, "another_temperature"),
    ("raw_t07", {"temperature": 0.7}, "temperature_not_applied"),
    ("bf16_t07", {}, "another_temperature"),
    ("top_p", {}, "top_p"),
    ("bf16_top_p", {}, "top_p"),
    ("top_k", {}, "top_k"),
    ("stale", {}, "stale_weights"),
    ("stale_head", {}, "stale_weights"),
]


@pytest.mark.parametrize(("name", "options", "cause"), ENGINE, ids=lambda x: str(x))
def test_recorded_rollouts_of_vllm(name: str, options: Arrays, cause: str | None) -> None:
    found = diagnosed(recorded(name) | options)
    assert found.cause == cause and found.agrees == (cause is None), str(found)


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_made_on_recorded_rollouts(case: str) -> None:
    cause, make = MISTAKES[case]
    found = diagnosed(make(padded(recorded("right"))))
    assert found.cause == cause, str(found)


# --- each hypothesis is needed ----------------------------------------------------------------------------------------


@pytest.mark.only_with_all
@pytest.mark.parametrize("case", MISTAKES)
def test_without_its_hypothesis_a_mistake_is_not_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cause, make = MISTAKES[case]
    add = diagnose._Scores.add
    monkeypatch.setattr(diagnose._Scores, "add", lambda self, x: None if x.name == cause else add(self, x))
    given = make(sampled())
    assert diagnosed(without_logits(given) if case in WITHOUT_LOGITS else given).cause != cause


# --- the report, the arguments, the memory ----------------------------------------------------------------------------


def test_the_report_has_the_finding_the_line_and_the_table() -> None:
    found = diagnosed(MISTAKES["old one late"][1](sampled()))
    lines = str(found).splitlines()
    assert lines[0] == f"{found.tokens:,} tokens of {found.sequences:,} responses"
    assert lines[2] == "Found: old_logprobs are 1 token late."
    assert lines[5] == "Change: old_logprobs = old_logprobs.roll(-1, dims=1)"
    assert sum(line.startswith("* old_logprobs_shifted") for line in lines) == 1
    assert sum(line.startswith("  as_given") for line in lines) == 1
    assert all(len(line) <= 100 for line in lines)
    assert "roll(-1, dims=0)" in diagnosed(packed(MISTAKES["old one late"][1](sampled()))).fix
    assert found.candidates[0] is found.given
    assert len({x.name for x in found.candidates}) == len(found.candidates) > 20


def test_the_page_has_a_report_of_these_rollouts() -> None:
    """The last digits are a processor's own; what was found, and the line to change, are not."""
    page = diagnosis_page.PAGE.read_text()
    found = diagnosis_page.report().split("difference in nats")[0].splitlines()
    assert all(line in page for line in found if not line.startswith("The mean"))
    causes = {part for cause, _ in MISTAKES.values() for part in cause.split(" + ")}
    causes |= {name for *_, name in ENGINE if name} | {x.name for x in diagnosed(sampled(0.01)).candidates[1:]}
    assert {name for name in causes if " + " not in name and f"`{name}`" not in page} == set()


def divided(given: Arrays) -> Arrays:
    return given | {"old_logprobs": given["old_logprobs"] / 0.7, "temperature": 0.7}


@pytest.mark.parametrize("layout", [dict, packed])
@pytest.mark.parametrize("case", ["old one late", "logits not shifted", "cumulative", "divided"])
def test_following_the_line_makes_the_arrays_agree(case: str, layout: Callable[[Arrays], Arrays]) -> None:
    given = layout((divided if case == "divided" else MISTAKES[case][1])(sampled()))
    names = dict(given)
    exec(diagnosed(given).fix, {"token_logprobs": token_logprobs}, names)
    assert diagnosed({name: names[name] for name in given}).agrees


def test_what_noise_means_for_the_clip_range_is_said() -> None:
    found = diagnosed(sampled(0.01))
    note = next(note for note in found.notes if "what remains is noise" in note)
    assert f"{found.given.rms:.1e} nats" in note and f"{found.given.clip_fraction:.0%} of these responses" in note
    tokens = int(re.search(r"from some ([\d,]+) tokens", note).group(1).replace(",", ""))  # type: ignore[union-attr]
    assert tokens == pytest.approx((1.96 * found.given.rms / 3e-4) ** 2, rel=0.11)


def test_log_probabilities_and_logits_exclude_each_other() -> None:
    given = sampled()
    with pytest.raises(ValueError, match=r"^logprobs: expected None with logits"):
        diagnosed(given | {"logprobs": given["old_logprobs"]})
    with pytest.raises(
        TypeError, match=r"^logprobs: expected the trainer's .* because there are no logits.*got NoneType None"
    ):
        diagnosed(given | {"logits": None})


def test_ids_that_are_no_columns_do_no_harm_where_masked() -> None:
    given = sampled()
    assert diagnosed(given | {"token_ids": given["token_ids"].masked_fill(~given["mask"], -100)}).agrees


class Largest(TorchDispatchMode):
    """How many elements the largest new tensor of floats has, views of the logits aside."""

    found = 0

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.memory = logits.untyped_storage().data_ptr()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor) and x.is_floating_point() and x.untyped_storage().data_ptr() != self.memory:
                self.found = max(self.found, x.numel())
        return result


def test_logits_are_never_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributions, "SAMPLED", 1 << 13)
    monkeypatch.setattr(kept_filter, "BLOCK", 1 << 13)
    given = MISTAKES["old one late"][1](sampled())
    given["logits"] = given["logits"].bfloat16().repeat(1, 1, 8)
    with Largest(given["logits"]) as largest:
        diagnosed(given)
    assert largest.found < given["logits"].numel() / 4
