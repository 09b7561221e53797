"""Rollouts, and the usual mistakes made on them, for the tests of `diagnose_mismatch`."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gspo_kernels import KeptTokens, MismatchDiagnosis, diagnose_mismatch

RECORDED = Path(__file__).parents[1] / "rollout" / "recorded" / "diagnosis.npz"
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


def without_logits(given: Arrays) -> Arrays:
    right = given["logits"].log_softmax(-1).gather(-1, given["token_ids"][..., None])[..., 0]
    return {name: x for name, x in given.items() if name != "logits"} | {"logprobs": right}
