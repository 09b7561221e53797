"""`diagnose_mismatch`: each mistake made on purpose is named, and right rollouts raise no alarm."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diagnosis_page  # docs/scripts/diagnosis_page.py
import numpy as np
import pytest
import torch
from modes import DEFAULT_MODE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gspo_kernels import KeptTokens, MismatchDiagnosis, diagnose_mismatch
from gspo_kernels.rollout.diagnosis import diagnose, distributions
from gspo_kernels.rows import kept_filter

pytestmark = DEFAULT_MODE

RECORDED = Path(__file__).parent / "recorded" / "diagnosis.npz"
Arrays = dict[str, Any]
B, T, V = 24, 30, 64


def sampled(
    noise: float = 0.0, temperature: float = 1.0, seed: int = 0, rows: int = B, scale: float = 2.0, **filters: Any
) -> Arrays:
    """Prompts and responses of ragged lengths, sampled from peaked logits; 0 where there is no response."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, T, V, generator=generator)
    logits += 3.0 * (torch.rand(rows, T, V, generator=generator) < 0.05)
    z = logits / temperature
    if filters:
        keep = torch.zeros(rows * T, V, dtype=torch.bool)
        for row, ids in enumerate(KeptTokens.from_logits(logits, temperature=temperature, **filters).to_lists()):
            keep[row, slice(None) if ids is None else ids] = True
        z = z.masked_fill(~keep.view(rows, T, V), -torch.inf)
    token_ids = torch.multinomial(z.softmax(-1).view(-1, V), 1, generator=generator).view(rows, T)
    begin = torch.randint(2, 8, (rows, 1), generator=generator)
    column = torch.arange(T)
    mask = (column >= begin) & (column < begin + torch.randint(6, T - 8, (rows, 1), generator=generator))
    old = z.log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    old = (old + noise * torch.randn(rows, T, generator=generator)).clamp(max=0.0)
    return {"logits": logits, "token_ids": token_ids, "old_logprobs": old.masked_fill(~mask, 0.0), "mask": mask}


def packed(given: Arrays) -> Arrays:
    flat = {
        name: x.flatten(0, 1) if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in given.items()
    }  # fmt: skip
    rows, width = given["token_ids"].shape
    return flat | {"cu_seqlens": torch.arange(rows + 1) * width}


def recorded(name: str) -> Arrays:
    """Rollouts of vLLM 0.32 with the logits of the trainer's model: made by recorded/record_diagnosis.py."""
    with np.load(RECORDED) as file:
        arrays = {key.split(".")[1]: torch.from_numpy(file[key]) for key in file.files if key.startswith(f"{name}.")}
    return arrays | {"mask": arrays["mask"].bool(), "token_ids": arrays["token_ids"].long()}


def padded(given: Arrays) -> Arrays:
    """A packed batch with a row for each sequence."""
    lengths = given["cu_seqlens"].diff().tolist()
    arrays = {name: x for name, x in given.items() if name != "cu_seqlens"}
    return {
        name: torch.nn.utils.rnn.pad_sequence(list(x.split(lengths)), batch_first=True) for name, x in arrays.items()
    }


def diagnosed(given: Arrays) -> MismatchDiagnosis:
    return diagnose_mismatch(**{"logits": None} | given)


# --- mistakes that need no logits: made on padded arrays --------------------------------------------------------------


def change(**changes: Callable[[Arrays], Tensor]) -> Callable[[Arrays], Arrays]:
    return lambda given: given | {name: make(given) for name, make in changes.items()}


def rolled(name: str, by: int) -> Callable[[Arrays], Tensor]:
    return lambda given: given[name].roll(by, 1)


def of_old(make: Callable[[Tensor], Tensor]) -> Callable[[Arrays], Arrays]:
    return change(old_logprobs=lambda given: make(given["old_logprobs"]))


def at_the_start(given: Arrays) -> Tensor:
    """Each response's values from column 0 on, 0 behind them."""
    rows = zip(given["old_logprobs"], given["mask"], strict=True)
    return torch.stack([torch.cat([old[mask], old.new_zeros(int((~mask).sum()))]) for old, mask in rows])


def at_the_end(given: Arrays) -> Tensor:
    rows = zip(given["old_logprobs"], given["mask"], strict=True)
    return torch.stack([torch.cat([old.new_zeros(int((~mask).sum())), old[mask]]) for old, mask in rows])


def total(given: Arrays) -> Tensor:
    return torch.where(given["mask"], given["old_logprobs"].nan_to_num().sum(1, keepdim=True), 0.0)


def of_logits(make: Callable[[Tensor], Tensor]) -> Callable[[Arrays], Arrays]:
    def old_logprobs(given: Arrays) -> Tensor:
        found = make(given["logits"]).float().log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
        return torch.where(given["mask"], found, 0.0)

    return change(old_logprobs=old_logprobs)


def nan_elsewhere(given: Arrays) -> Arrays:
    return given | {"old_logprobs": given["old_logprobs"].masked_fill(~given["mask"], torch.nan)}


MISTAKES: dict[str, tuple[str, Callable[[Arrays], Arrays]]] = {
    "old one late": ("old_logprobs_shifted", change(old_logprobs=rolled("old_logprobs", 1))),
    "old one early": ("old_logprobs_shifted", change(old_logprobs=rolled("old_logprobs", -1))),
    "old three late": ("old_logprobs_shifted", change(old_logprobs=rolled("old_logprobs", 3))),
    "ids one late": ("token_ids_shifted", change(token_ids=rolled("token_ids", 1))),
    "ids one early": ("token_ids_shifted", change(token_ids=rolled("token_ids", -1))),
    "logits not shifted": (
        "logits_shifted",
        change(**{name: rolled(name, 1) for name in ("token_ids", "old_logprobs", "mask")}),
    ),
    "shifted twice": (
        "logits_shifted",
        change(**{name: rolled(name, -1) for name in ("token_ids", "old_logprobs", "mask")}),
    ),
    "mask one late": ("mask_shifted", change(mask=rolled("mask", 1))),
    "mask one early": ("mask_shifted", change(mask=rolled("mask", -1))),
    "mask one early, NaN": ("mask_shifted", lambda given: nan_elsewhere(given) | {"mask": given["mask"].roll(-1, 1)}),
    "mask inverted": ("mask_inverted", change(mask=lambda given: ~given["mask"])),
    "mask of the prompt": (
        "mask_of_other_tokens",
        change(mask=lambda given: given["mask"].long().cumsum(1) == 0),
    ),
    "mask of all": ("mask_too_wide", change(mask=lambda given: torch.ones_like(given["mask"]))),
    "mask of all, NaN": ("mask_too_wide", lambda given: nan_elsewhere(given) | {"mask": given["mask"] >= 0}),
    "at the start": ("old_logprobs_at_the_start", change(old_logprobs=at_the_start)),
    "at the end": ("old_logprobs_at_the_end", change(old_logprobs=at_the_end)),
    "another order": ("responses_permuted", change(old_logprobs=lambda given: given["old_logprobs"].roll(5, 0))),
    "probabilities": ("probabilities", of_old(torch.exp)),
    "negative": ("negated", of_old(torch.neg)),
    "base 2": ("base_2", of_old(lambda old: old / np.log(2.0))),
    "base 10": ("base_10", of_old(lambda old: old / np.log(10.0))),
    "times 3": ("scaled", of_old(lambda old: old * 3.0)),
    "sum": ("sequence_sums", change(old_logprobs=total)),
    "mean": (
        "sequence_means",
        change(old_logprobs=lambda given: total(given) / given["mask"].sum(1, keepdim=True).clamp(min=1)),
    ),
    "cumulative": (
        "cumulative_sums",
        change(old_logprobs=lambda given: given["old_logprobs"].nan_to_num().cumsum(1) * given["mask"]),
    ),
    "bfloat16": ("logprobs_rounded", of_old(lambda old: old.bfloat16().float())),
    "bfloat16, as it is": ("logprobs_rounded", of_old(lambda old: old.bfloat16())),
    "float16": ("logprobs_rounded", of_old(lambda old: old.half().float())),
    "logits in bfloat16": ("logits_rounded_to_bfloat16", of_logits(lambda logits: logits.bfloat16())),
    "most likely": (
        "most_likely_token",
        change(
            old_logprobs=lambda given: torch.where(given["mask"], given["logits"].log_softmax(-1).amax(-1), 0.0)
        ),
    ),
    "one late, negative": (
        "old_logprobs_shifted + negated",
        change(old_logprobs=lambda given: -given["old_logprobs"].roll(1, 1)),
    ),
    "one late, another temperature": (
        "old_logprobs_shifted + another_temperature",
        lambda given: of_logits(lambda logits: logits / 0.6)(given)
        | {"old_logprobs": of_logits(lambda logits: logits / 0.6)(given)["old_logprobs"].roll(1, 1)},
    ),
}  # fmt: skip
WITHOUT_LOGITS = [
    case for case, (cause, _) in MISTAKES.items()
    if not re.search("token_ids|logits_|most_likely|temperature", cause)
]  # fmt: skip
EXACT = {  # made of exact values
    "logits in bfloat16", "bfloat16", "bfloat16, as it is", "float16", "most likely", "one late, another temperature",
}  # fmt: skip


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


def without_logits(given: Arrays) -> Arrays:
    right = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    return {name: x for name, x in given.items() if name != "logits"} | {"logprobs": right}


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


# --- distributions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "loss", "cause", "change"),
    [
        (0.7, 1.0, "another_temperature", "pass temperature=0.7 to the loss"),
        (1.0, 0.7, "temperature_not_applied", "pass no temperature= to the loss"),
        (0.49, 0.7, "temperature_applied_twice", "pass temperature=0.49 to the loss"),
        (1 / 0.7, 0.7, "temperature_inverted", "pass temperature=1.429 to the loss"),
        (0.8, 0.6, "another_temperature", "pass temperature=0.8 to the loss"),
        (0.83, 1.0, "another_temperature", "pass temperature=0.83 to the loss"),
    ],
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_a_temperature_is_fitted(engine: float, loss: float, cause: str, change: str, noise: float) -> None:
    found = diagnosed(sampled(noise, temperature=engine) | {"temperature": loss})
    assert found.cause == cause and found.fix.startswith(change)
    label, value = next(x for x in found.candidates if x.name == cause).fitted[0]
    assert label == "temperature" and value == pytest.approx(engine, rel=1e-3 if not noise else 0.02)


def test_raw_log_probabilities_are_told_from_logits_that_were_divided_before() -> None:
    """By the temperature at which the tokens themselves are most likely."""
    given = sampled(temperature=0.7, rows=64)
    raw = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    found = diagnosed(given | {"old_logprobs": raw, "temperature": 0.7})
    assert found.cause == "temperature_not_applied" and 'logprobs_mode="processed_logprobs"' in found.fix
    divided = diagnosed(given | {"logits": given["logits"] / 0.7, "temperature": 0.7})
    assert divided.cause == "temperature_not_applied"
    assert divided.fix.startswith("pass no temperature= to the loss: it sampled at 1, or the logits are divided by 0.7")


def test_a_temperature_for_each_token() -> None:
    given = sampled(temperature=0.6)
    found = diagnosed(given | {"temperature": torch.full((B, T), 0.5)})
    assert found.cause == "another_temperature"
    assert found.candidates[1].fitted == (("times the given temperature", 1.2),)
    assert diagnosed(given | {"temperature": torch.full((B, 1), 0.6)}).agrees


FILTERS: list[Arrays] = [
    {"top_p": 0.8}, {"top_p": 0.95}, {"top_k": 4}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9},
    {"top_p": 0.8, "temperature": 0.7}, {"top_k": 5, "temperature": 0.6},
]  # fmt: skip


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_filters_are_inferred(filters: Arrays, noise: float) -> None:
    found = diagnosed(sampled(noise, **filters, rows=40))
    names = [name for name in filters if name != "temperature"]
    assert found.cause == "_and_".join(names)
    fitted = dict(next(x for x in found.candidates if x.name == found.cause).fitted)
    assert fitted.get("temperature", 1.0) == filters.get("temperature", 1.0)
    assert all(fitted[name] == pytest.approx(filters[name], rel=0.06) for name in names)
    options = ", ".join(f"{name}={fitted[name]:g}" for name in names)
    assert f"kept=KeptTokens.from_logits(logits, {options}" in found.fix


def test_the_sets_that_the_diagnosis_suggests_make_the_arrays_agree() -> None:
    given = sampled(top_p=0.8)
    kept = KeptTokens.from_logits(given["logits"], top_p=0.8, mask=given["mask"])
    assert diagnosed(given | {"kept": kept}).agrees
    whole = diagnosed(sampled() | {"kept": KeptTokens.from_logits(sampled()["logits"], top_k=V - 1)})
    assert whole.given.mean < 0.05
    raw = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    found = diagnosed(given | {"kept": kept, "old_logprobs": raw})
    assert found.cause == "whole_vocabulary" and "processed_logprobs" in found.fix
    assert "top_p" in found.untried


def test_a_temperature_that_divided_log_probabilities() -> None:
    given = sampled()
    old = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0] / 0.7
    found = diagnosed(given | {"old_logprobs": old, "temperature": 0.7})
    assert found.cause == "temperature_divides_logprobs" and "before log_softmax" in found.fix


def test_other_weights_are_told_from_what_is_unknown() -> None:
    """Tokens sampled from the old distribution have E[exp(new - old)] = 1; with anything else that would be chance."""
    given = sampled(rows=48)
    drift = torch.randn(given["logits"].shape, generator=torch.Generator().manual_seed(1))
    found = diagnosed(given | {"logits": given["logits"] + 0.3 * drift})
    assert found.cause == "stale_weights" and "named_parameters()" in found.fix
    unknown = diagnosed(given | {"old_logprobs": -3.0 * torch.rand(48, T, generator=torch.Generator().manual_seed(2))})
    assert unknown.cause is None and not unknown.agrees and unknown.fix == ""
    assert "none of the usual mistakes" in str(unknown)
    doubled = given["old_logprobs"] - given["old_logprobs"].square() * 0.5
    assert diagnosed(given | {"old_logprobs": doubled}).cause is None


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


def test_following_the_line_makes_the_arrays_agree() -> None:
    given = MISTAKES["old one late"][1](sampled())
    names = {"old_logprobs": given["old_logprobs"]}
    exec(diagnosed(given).fix, {}, names)
    assert diagnosed(given | names).agrees


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
