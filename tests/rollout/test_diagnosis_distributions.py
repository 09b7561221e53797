"""`diagnose_mismatch`: which distribution old log-probabilities are of: a temperature, filters, other weights."""

from __future__ import annotations

import pytest
import torch
from mistakes import (
    Arrays,
    B,
    T,
    V,
    diagnosed,
    sampled,
)
from modes import DEFAULT_MODE

from gspo_kernels import KeptTokens

pytestmark = DEFAULT_MODE


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
    {"top_p": 0.8}, {"top_p": 0.95}, {"top_k": 4}, {"top_k": 15}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.9},
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
