"""The experts that an engine's routers chose, for routing replay: decoded, and placed beside the tokens they are of."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from .parsing import LAST_PART

HIGHEST_EXPERT = 2**15 - 1  # of int16


class RoutedExperts(NamedTuple):
    """The experts of a response's prompt and tokens, without the last token, which was never a model's input."""

    where: str  # their position in `outputs`, for error messages
    rows: Tensor  # [rows, layers, k] int16


def read_experts(where: str, values: Any, raw: tuple[int, int] | None = None) -> Tensor | None:
    """[rows, layers, k] int16 from an array, from nested lists, or from the base64 text of a server.

    Text holds a `.npy` file (vLLM), or, with `raw` = (layers, k), int32 values alone (SGLang).
    """
    if values is None:
        return None
    found = _decoded(where, values, raw) if isinstance(values, str) else _array(where, values)
    if found.dtype not in checks.INTEGERS:
        raise TypeError(f"{where}: expected the numbers of experts, integers; got {found.dtype}")
    if found.ndim != 3:
        raise ValueError(f"{where}: expected [tokens, layers, experts per token]; got shape {list(found.shape)}")
    if raw is not None and tuple(found.shape[1:]) != raw:
        raise ValueError(f"{where}: expected [tokens, {raw[0]}, {raw[1]}], experts_shape; got {list(found.shape)}")
    found = found.to("cpu", torch.int64)  # uint16 has no minimum
    if found.numel() and not (int(found.min()) >= 0 and int(found.max()) <= HIGHEST_EXPERT):
        wrong = int(found.min()) if int(found.min()) < 0 else int(found.max())
        raise ValueError(f"{where}: expected numbers of experts, from 0 to {HIGHEST_EXPERT}; got {wrong}")
    return found.to(torch.int16)


def _array(where: str, values: Any) -> Tensor:
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"{where}: expected an array [tokens, layers, experts per token]; got {checks.describe(values)}"
        ) from error


def _decoded(where: str, text: str, raw: tuple[int, int] | None) -> Tensor:
    expected = "an .npy file" if raw is None else "int32 values"
    try:
        data = base64.b64decode(text, validate=True)
        if raw is None:
            import numpy  # only here: the package does without it

            return torch.from_numpy(numpy.load(io.BytesIO(data), allow_pickle=False).copy())
        found = torch.frombuffer(bytearray(data), dtype=torch.int32) if data else torch.empty(0, dtype=torch.int32)
    except (binascii.Error, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{where}: expected {expected} as base64; got text that is none ({error})") from error
    if found.numel() % (raw[0] * raw[1]):
        raise ValueError(
            f"{where}: expected {raw[0]} x {raw[1]} experts for each token, experts_shape; got {found.numel()} values"
        )
    return found.view(-1, *raw)


def check_rows(experts: RoutedExperts, prompt: int, tokens: int) -> None:
    """An engine may leave out tokens at the start of the prompt, no others."""
    rows = experts.rows.shape[0]
    all_of_them = max(0, prompt + tokens - 1)
    if not max(0, tokens - 1) <= rows <= all_of_them:
        part = f": {LAST_PART}" if rows > all_of_them else ""
        raise ValueError(
            f"{experts.where}: expected those of {prompt} prompt tokens and of {tokens} sampled tokens without the "
            f"last, {all_of_them} rows, or fewer at the start of the prompt; got {rows}{part}"
        )


def experts_of_tokens(found: list[tuple[int, int, RoutedExperts | None]], device: torch.device) -> Tensor | None:
    """[P + N, layers, k] of all sequences (prompt tokens, sampled tokens, experts); None where none has experts."""
    first = next((experts for *_, experts in found if experts is not None and experts.rows.shape[0]), None)
    if first is None:
        return None
    shape = first.rows.shape[1:]
    result = torch.full((sum(p + n for p, n, _ in found), *shape), -1, dtype=torch.int16, device="cpu")
    end = 0
    for prompt, tokens, experts in found:
        end += prompt + tokens
        if experts is None or not (rows := experts.rows.shape[0]):
            continue
        if experts.rows.shape[1:] != shape:
            raise ValueError(
                f"{experts.where}: expected {shape[0]} layers of {shape[1]} experts, as {first.where} has; got "
                f"{list(experts.rows.shape)}"
            )
        result[end - 1 - rows : end - 1] = experts.rows  # no router has read the last token
    return result.to(device)
