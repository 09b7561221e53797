"""The responses of recent updates as a few numbers each, over all ranks and on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.agreement import Agreement
from ..base.collectives import Ranks, gather
from ..base.devices import check_float64
from ..base.layout import Layout, batch_shape
from ..base.scalars import FINITE, run_time
from ..base.torch_internals import device_types_of

KINDS = ("sequence", "token")
MEANING = "log-ratios, such as stats.log_ratio"
Arrays = tuple[Any, Any, Any, Any]  # log_ratio, advantages, mask, cu_seqlens of one update


class Settings(NamedTuple):
    """What has to be the same on all ranks."""

    share: float
    low: float | None  # eps_low of `current`
    high: float | None


class RecentResponses(NamedTuple):
    """All responses of all ranks, in their order."""

    ratio_of: str
    low: Tensor  # [responses] float64: how far minus the log-ratio is above 0; -inf without a negative advantage
    high: Tensor  # the same of the log-ratio; -inf without a positive advantage
    lengths: Tensor  # [responses], unmasked tokens; 1 where they are not known
    noise: float | None


def recent_responses(
    log_ratio: Any,
    advantages: Any,
    mask: Any,
    cu_seqlens: Any,
    ratio_of: str | None,
    noise: Any,
    cp: Ranks | None,
    ranks: Ranks | None,
    settings: Settings,
) -> RecentResponses:
    """The arguments of `suggest_clip_range`, checked, gathered and read."""
    given = _updates(log_ratio, advantages, mask, cu_seqlens, empty=ranks is not None)
    with Agreement("log_ratio", given[0][0] if given else None, cp=cp) as agreement:
        kinds = _kinds(given)
        known = _known_kind(given, kinds) or ("token" if ratio_of == "token" else None)
        found: list[_Update] = []
        for index, (arrays, own) in enumerate(zip(given, kinds, strict=True)):
            with _of_update(index, len(given)):
                checks.same_device("log_ratio", arrays[0], given[0][0].device)
                if own is None and known is None:
                    _check_lengths_are_1(arrays, cp)
                found.append(_responses(*arrays, own or known, ratio_of, lengths_needed=noise is not None))
                _same_kind(found)
        device = found[0].numbers.device if found else _device_of(ranks)
        unread = _noise(noise, device)
        kind = ratio_of or known
        if kind is None and any(update.numbers.numel() for update in found) and not checks.may_read(given[0][0]):
            kind = "sequence"
        if agreement.active:
            sizes = tuple(update.numbers.shape[1] for update in found)
            agreement.same(settings._asdict() | {"ratio_of": kind, "log_ratio (responses of updates)": sizes})
    parts = [_reach(_whole(update, cp), kind or "sequence") for update in found]
    numbers = torch.cat([torch.zeros(4, 0, dtype=torch.float64, device=device), *parts], dim=1)
    return _on_host(numbers, [part.shape[1] for part in parts], settings, kind, unread, ranks)


# ---- arguments


def _noise(noise: Any, device: torch.device) -> Tensor:
    """0-d float64; -inf for None. The value of a tensor is checked where it is read."""
    meaning = "a standard deviation in nats"
    if noise is None:
        return run_time(-math.inf, device)
    if not isinstance(noise, Tensor):
        if isinstance(getattr(noise, "noise", None), Tensor):
            checks.tensor("noise", noise, meaning)  # refuses it, and says which attribute to pass
        return run_time(checks.number("noise", noise, meaning, at_least=0.0), device)
    checks.shape("noise", checks.tensor("noise", noise, meaning), (), "one number")
    checks.numbers("noise", noise)
    checks.same_device("noise", noise, device)
    return noise.detach().double()


def _updates(log_ratio: Any, advantages: Any, mask: Any, cu_seqlens: Any, empty: bool) -> list[Arrays]:
    """One tuple for each update. `empty`: whether there may be none."""
    if not _is_list(log_ratio):
        if not isinstance(log_ratio, Tensor) and isinstance(log_ratio, Iterator):
            raise TypeError(
                f"log_ratio: expected a tensor, or a list of one per update; got {checks.describe(log_ratio)}"
            )
        for name, value in (("advantages", advantages), ("mask", mask), ("cu_seqlens", cu_seqlens)):
            if _is_list(value) and any(isinstance(x, Tensor) for x in value):
                raise TypeError(
                    f"{name}: expected one tensor, as log_ratio is; got a list of {len(value)}. For several updates, "
                    "pass lists of all of them"
                )
        return [(log_ratio, advantages, mask, cu_seqlens)]
    if not log_ratio and not empty:
        raise ValueError("log_ratio: expected the log-ratios of at least one update; got an empty list")
    for index, value in enumerate(log_ratio):
        with _of_update(index, len(log_ratio)):
            checks.tensor("log_ratio", value, MEANING)
    lists = [list(log_ratio)]
    for name, value in (("advantages", advantages), ("mask", mask), ("cu_seqlens", cu_seqlens)):
        if value is None and name != "advantages":
            lists.append([None] * len(log_ratio))
            continue
        if not _is_list(value):
            raise TypeError(f"{name}: expected a list of one per update, as log_ratio is; got {checks.describe(value)}")
        if len(value) != len(log_ratio):
            raise ValueError(
                f"{name}: expected a list of {len(log_ratio)}, one per update, as log_ratio is; got {len(value)}"
            )
        lists.append(list(value))
    return list(zip(*lists, strict=True))


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


@contextmanager
def _of_update(index: int, count: int) -> Iterator[None]:
    """An error says of which update it is, if there are several."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if count == 1:
            raise
        raise type(error)(f"{error} (update {index + 1} of {count})") from None


# ---- the responses of one update


class _Update(NamedTuple):
    ratio_of: str  # what has a ratio by the shape of log_ratio
    numbers: Tensor  # [5, S] float64: the rows below


# Rows of `_Update.numbers`: of tokens the sum of log-ratios, of sequences their log-ratio; unmasked tokens; how far
# tokens of a negative advantage reach below 1, and those of a positive one above (-inf: there is none; 0 where the
# response counts by its mean); advantages that are NaN.
TOTAL, LENGTH, LOW, HIGH, UNKNOWN = range(5)


def _kinds(given: list[Arrays]) -> list[str | None]:
    """What the log-ratios of each update belong to, by their shape; None: either, or there is no response."""
    kinds = []
    for index, (log_ratio, _, mask, cu_seqlens) in enumerate(given):
        with _of_update(index, len(given)):
            checks.digits("log_ratio", checks.tensor("log_ratio", log_ratio, MEANING))
            for name, value in (("mask", mask), ("cu_seqlens", cu_seqlens)):
                if value is not None:
                    checks.tensor(name, value, "True or 1 where a token counts" if name == "mask" else "boundaries")
            kinds.append(_kind(log_ratio.shape, mask, cu_seqlens))
    return kinds


def _responses(
    log_ratio: Tensor,
    advantages: Any,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    kind: str | None,
    ratio_of: str | None,
    *,
    lengths_needed: bool,
) -> _Update:
    """One column for each response: of this rank's tokens, if context-parallel ranks share them."""
    check_float64(log_ratio.device)
    ratios = log_ratio.detach().clamp(-FINITE, FINITE)  # keeps NaN; no inf - inf can arise
    if kind == "token":
        return _Update("token", _of_tokens(ratios, advantages, mask, cu_seqlens, by_mean=ratio_of == "sequence"))
    if ratio_of == "token" and len(ratios):
        raise ValueError(
            "log_ratio: expected the log-ratios of tokens, because the range is one of token ratios (by ratio_of or "
            f"current); got one per response, of shape {list(log_ratio.shape)}. Pass stats.logprobs - old_logprobs, of "
            "shape [B, T], or packed with cu_seqlens"
        )
    if lengths_needed and mask is None and cu_seqlens is None:
        raise ValueError(
            "mask: expected the losses' mask, or cu_seqlens, because noise averages out over the length of a response; "
            "got None"
        )
    return _Update("sequence", _of_sequences(ratios.reshape(-1), advantages, mask, cu_seqlens))


def _kind(shape: torch.Size, mask: Tensor | None, cu_seqlens: Tensor | None) -> str | None:
    """One of `KINDS`; None for packed [S] where there may be S tokens, unless [1, N] and [S, 1] say what they are."""
    if len(shape) not in (1, 2):
        raise ValueError(
            f"log_ratio: expected [sequences] or, of tokens, [sequences, tokens] or packed [tokens]; got {list(shape)}"
        )
    if cu_seqlens is None or cu_seqlens.ndim != 1:
        column = mask is not None and mask.ndim == 2 and mask.shape[1] != 1 and shape == (mask.shape[0], 1)
        return "sequence" if len(shape) == 1 or column else "token"
    count = cu_seqlens.shape[0] - 1
    if shape.numel() != count or (len(shape) == 2 and count != 1):
        return "sequence" if shape == (count, 1) else "token"
    if mask is not None and mask.ndim == 1:
        tokens = len(mask)
    else:
        tokens = int(cu_seqlens[-1]) if checks.may_read(cu_seqlens) else count
    return None if tokens == count else "sequence"


def _known_kind(given: list[Arrays], kinds: list[str | None]) -> str | None:
    """That of the updates whose shape says it."""
    return next((kind for (log_ratio, *_), kind in zip(given, kinds, strict=True) if kind and log_ratio.numel()), None)


def _check_lengths_are_1(arrays: Arrays, cp: Ranks | None) -> None:
    """Of a packed batch with as many tokens as sequences: log-ratios of either are then the same."""
    log_ratio, _, _, cu_seqlens = arrays
    count = log_ratio.numel()
    if not checks.may_read(cu_seqlens) or (cp is None and bool((cu_seqlens.diff() == 1).all())) or not count:
        return
    raise ValueError(
        f"log_ratio: expected a second dimension that says what the numbers belong to, because this packed batch has "
        f"{count} tokens and {count} sequences: log_ratio[None] for tokens, log_ratio[:, None] for sequences; got "
        f"shape {list(log_ratio.shape)}. For token ratios, ratio_of='token' says so too"
    )


def _of_tokens(ratios: Tensor, advantages: Any, mask: Any, cu_seqlens: Any, *, by_mean: bool) -> Tensor:
    if cu_seqlens is not None and ratios.ndim == 2 and ratios.shape[0] == 1:
        ratios = ratios[0]
    batch = batch_shape(ratios.shape, mask, cu_seqlens, ratios.device)
    layout = batch.layout()
    checks.tensor("advantages", advantages, "the losses' advantages")
    values, per_token = batch.per_either("advantages", advantages, "advantages")
    signs = layout.of_tokens(values) if per_token else layout.spread(values.double())
    log_ratios = layout.of_tokens(ratios)
    reach = torch.zeros_like(log_ratios) if by_mean else log_ratios
    low, high = (
        _largest(layout, torch.where(layout.mask & (sign * signs > 0), sign * reach, -torch.inf))
        for sign in (-1.0, 1.0)
    )
    unknown = layout.local_sum(signs.isnan().double())
    return torch.stack([layout.local_sum(log_ratios), layout.local_lengths, low, high, unknown])


def _of_sequences(ratios: Tensor, advantages: Any, mask: Any, cu_seqlens: Any) -> Tensor:
    count, device = len(ratios), ratios.device
    lengths = torch.ones(count, dtype=torch.float64, device=device)
    if mask is not None:
        lengths = batch_shape(mask.shape, mask, cu_seqlens, device).layout().local_lengths
    elif cu_seqlens is not None:
        checks.same_device("cu_seqlens", cu_seqlens, device)
        whole = cu_seqlens.ndim == 1 and cu_seqlens.numel() > 0 and cu_seqlens.dtype in checks.INTEGERS
        tokens = max(0, int(cu_seqlens[-1])) if whole else 0  # else it is refused
        lengths = batch_shape(torch.Size([tokens]), None, cu_seqlens, device).layout().local_lengths
    if len(lengths) != count:
        raise ValueError(
            f"log_ratio: expected {len(lengths)} log-ratios, one per sequence of "
            f"{'mask' if cu_seqlens is None else 'cu_seqlens'}, or one per token; got shape {[count]}"
        )
    signs = checks.tensor("advantages", advantages, "the losses' advantages").detach()
    checks.same_device("advantages", signs, device)
    checks.numbers("advantages", signs)
    if signs.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"advantages: expected shape {[count]} (one per sequence, as log_ratio); got {list(signs.shape)}. "
            + (
                "If all tokens of a response have the same, pass (advantages * mask).sum(1) / mask.sum(1)"
                if signs.ndim == 2 and len(signs) == count
                else "If log_ratio has packed tokens, pass cu_seqlens"
            )
        )
    signs = signs.reshape(-1).double()
    low, high = (torch.where((sign * signs > 0) & (lengths > 0), 0.0, -torch.inf).double() for sign in (-1.0, 1.0))
    return torch.stack([ratios.double(), lengths, low, high, signs.isnan().double()])


def _largest(layout: Layout, values: Tensor) -> Tensor:
    """[tokens] -> [sequences], over this rank's tokens; -inf for a sequence without any."""
    sequences = torch.arange(layout.sequences, dtype=torch.float64, device=values.device)
    of_token = layout.spread(sequences).long()  # 0 where masked, where values are -inf
    return values.new_full((layout.sequences,), -torch.inf).scatter_reduce(0, of_token, values, "amax")


def _same_kind(updates: list[_Update]) -> None:
    """Of all updates that have a response."""
    kinds = [update.ratio_of for update in updates if update.numbers.numel()]
    if len(set(kinds)) > 1:
        raise ValueError(f"log_ratio: expected one per {kinds[0]}, as in updates before; got one per {kinds[-1]}")


def _whole(update: _Update, cp: Ranks | None) -> _Update:
    """The numbers of whole responses, which context-parallel ranks share."""
    if cp is None:
        return update
    of_ranks = gather(update.numbers, cp)
    total, lengths, unknown = of_ranks[:, [TOTAL, LENGTH, UNKNOWN]].sum(0)
    low, high = of_ranks[:, [LOW, HIGH]].amax(0)
    if update.ratio_of == "sequence":  # the same on every rank
        total = update.numbers[TOTAL]
    return _Update(update.ratio_of, torch.stack([total, lengths, low, high, unknown]))


RATIO, ADVANTAGE, BOUNDARIES = 1.0, 2.0, 3.0  # which argument of a response is wrong


def _reach(update: _Update, ratio_of: str | None) -> Tensor:
    """[4, S]: `low`, `high` and `lengths` of `RecentResponses`; 0, or which argument is wrong."""
    total, lengths, low, high, unknown = update.numbers
    if ratio_of == "sequence":
        mean = total / lengths.clamp(min=1) if update.ratio_of == "token" else total
        low, high = low - mean, high + mean
    some = lengths > 0
    low, high = (torch.where(some, x, -torch.inf) for x in (low, high))
    wrong = torch.where(lengths.isnan(), BOUNDARIES, torch.zeros_like(lengths))
    wrong = torch.where(some & (unknown > 0), ADVANTAGE, wrong)
    wrong = torch.where(some & total.isnan(), RATIO, wrong)
    return torch.stack([low, high, lengths, wrong])


# ---- all responses, on the host


def _on_host(
    mine: Tensor, of_update: list[int], settings: Settings, kind: str | None, noise: Tensor, ranks: Ranks | None
) -> RecentResponses:
    """`mine`: [4, responses] of this rank; `of_update`: how many each of its updates has."""
    known = [math.nan if x is None else x for x in settings]
    numbers = [float(mine.shape[1]), -1.0 if kind is None else float(KINDS.index(kind)), *known]
    header = torch.stack([*(run_time(x, mine.device) for x in numbers), noise])
    if ranks is None:
        read = torch.cat([header, mine.flatten()]).cpu()
        headers, parts = read[None, : len(header)], [read[len(header) :].reshape(4, -1)]
    else:
        headers = gather(header, ranks).cpu()
        sizes = [int(x) for x in headers[:, 0].tolist()]
        padded = mine.new_zeros(4, max(sizes))
        padded[:, : mine.shape[1]] = mine
        parts = [x[:, :size] for x, size in zip(gather(padded, ranks).cpu(), sizes, strict=True)]
    _, kinds, *others, noises = headers.T.tolist()
    known_kinds = [KINDS[int(x)] for x in kinds if x >= 0]  # those of ranks with responses
    if ranks is not None:
        _compare("ratio_of", known_kinds)
        for name, values in zip(("share", "current: eps_low", "current: eps_high"), others, strict=True):
            _compare(name, ["None" if math.isnan(x) else f"{x:.10g}" for x in values])
    _refuse_wrong([part[3] for part in parts], 0 if ranks is None else ranks.rank, of_update)
    low, high, lengths, _ = torch.cat(parts, dim=1)
    of_all = _of_noises(noises, [float(part[2].sum()) for part in parts])
    return RecentResponses(known_kinds[0] if known_kinds else KINDS[0], low, high, lengths, of_all)


def _compare(name: str, values: list[str]) -> None:
    """Refuses, on all ranks, what differs between them."""
    if len(set(values)) > 1:
        raise ValueError(f"{name}: expected the same on every rank of group; got {', '.join(values)}")


def _of_noises(noises: list[float], tokens: list[float]) -> float | None:
    """Of the ranks' noises the root mean square over tokens; None if there is none."""
    if all(x == -math.inf for x in noises):
        return None
    if wrong := [x for x in noises if not (0 <= x < math.inf or x == -math.inf)]:
        raise ValueError(f"noise: expected a standard deviation in nats, a finite number of at least 0; got {wrong[0]}")
    pairs = [(x, n) for x, n in zip(noises, tokens, strict=True) if n > 0]
    if any(x == -math.inf for x, _ in pairs):
        raise ValueError("noise: expected a number on every rank of group, because others have one; got None on some")
    count = sum(n for _, n in pairs)
    return math.sqrt(sum(n * x**2 for x, n in pairs) / count) if count else max(noises)


def _refuse_wrong(of_ranks: list[Tensor], rank: int, of_update: list[int]) -> None:
    """Refuses NaN, on all ranks."""
    if not any(bool(wrong.any()) for wrong in of_ranks):
        return
    found = of_ranks[rank].nonzero()
    if not len(found):
        raise ValueError("group: expected arguments that every rank accepts; NaN is refused, and explained, on another")
    index = int(found[0])
    kind = int(of_ranks[rank][index])
    if kind == BOUNDARIES:
        raise ValueError(
            "cu_seqlens: expected boundaries that start at 0, never decrease and end at the number of tokens; got "
            "others"
        )
    name, response, update = "log_ratio" if kind == RATIO else "advantages", index, 0
    while response >= of_update[update]:
        response, update = response - of_update[update], update + 1
    where = f"response {response}" + (f" of update {update + 1} of {len(of_update)}" if len(of_update) > 1 else "")
    raise ValueError(f"{name}: expected numbers where the mask is set; got NaN in {where}, whose loss is NaN too")


def _device_of(ranks: Ranks | None) -> torch.device:
    """Of a rank without an update: where the others most likely have theirs."""
    on_cpu = ranks is None or "cpu" in device_types_of(ranks.group()) or not torch.cuda.is_available()
    return torch.device("cpu" if on_cpu else "cuda")
