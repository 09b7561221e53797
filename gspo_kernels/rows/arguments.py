"""Checks of a caller's arguments about rows: token ids, mask, temperature, vocabulary; and what ranks compare."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import checks
from ..base.agreement import Agreement, fingerprint
from ..base.layout import as_bool
from ..base.scalars import run_time
from .kept import KeptTokens
from .operators import check_ids_and_temperatures, check_kept
from .types import KeptForm, Rows, stats_dtype
from .vocab_shard import VocabShard


class RowArrays(NamedTuple):
    """What a caller says of rows, checked, in the form of `Rows`."""

    token_ids: Tensor  # [outer, inner]
    mask: Tensor | None
    temperature: Tensor
    tanh_scale: Tensor | None

    def rows(self, logits: Tensor, vocab_size: int, kept: KeptTokens | None = None) -> Rows:
        """With logits as [outer, inner, columns], packed ones as [1, N, columns]."""
        of_rows = logits if logits.ndim == 3 else logits[None]
        form = None if kept is None else kept_form(kept, self.mask)
        return self._rows(of_rows, vocab_size, kept, form)

    def gathered(self, logits: Tensor, kept: KeptTokens) -> Rows:
        """With the logits [entries] of the kept columns alone."""
        return self._rows(logits[None, None], logits.shape[0], kept, "gathered")

    def _rows(self, logits: Tensor, vocab_size: int, kept: KeptTokens | None, form: KeptForm | None) -> Rows:
        return Rows(
            logits,
            self.token_ids,
            self.mask,
            self.temperature,
            vocab_size,
            tanh_scale=self.tanh_scale,
            kept_ids=None if kept is None else kept.token_ids,
            kept_offsets=None if kept is None else kept.offsets,
            kept_form=form,
        )


def kept_form(kept: KeptTokens, mask: Tensor | None) -> KeptForm:
    """Whether rows without entries have to be expected. Looks, where that is free."""
    every = kept.every_row
    if checks.may_read(kept.offsets) and not checks.watched(kept.offsets):
        has_entries = kept.counts > 0
        every = bool((has_entries if mask is None else has_entries | ~mask.reshape(-1)).all())
    return "every" if every else "some"


def row_arrays(
    logits: torch.dtype, token_ids: Tensor, mask: Tensor | None, temperature: Any, logit_scale: Any, softcap: Any
) -> RowArrays:
    """Checks temperature, logit_scale and softcap.

    With z the numbers whose softmax the probabilities are: z = logit_scale * x / temperature, or, with a softcap c,
    z = c tanh(logit_scale * x / c) / temperature. So a scale alone is part of the temperature, and so is a cap.

    Args:
        logits: their dtype.
    """
    of_head = "what the head's output is multiplied by"
    scale = checks.number("logit_scale", logit_scale, of_head, at_least=1e-6, at_most=1e6)
    cap = None
    if softcap is not None:
        cap = checks.number("softcap", softcap, "the bound of the logits, or None", at_least=1e-3, at_most=1e6)
    cpu = torch.device("cpu")
    if isinstance(temperature, Tensor):
        temperature = _as_rows(_temperatures(temperature, token_ids).to(stats_dtype(logits)))
    else:
        temperature = checks.number(
            "temperature", temperature, "what the logits are divided by", at_least=1e-6, at_most=1e6
        )
        _check_quotient(temperature, scale, cap)
        temperature = run_time(temperature, cpu)
    tanh_scale = None
    if cap is not None:
        bound = run_time(cap, cpu)
        temperature, tanh_scale = temperature / bound, run_time(scale, cpu) / bound
    elif scale != 1.0:
        temperature = temperature / run_time(scale, cpu)
    return RowArrays(
        _as_rows(token_ids.to(torch.int64)), None if mask is None else _as_rows(mask), temperature, tanh_scale
    )


def _check_quotient(temperature: float, scale: float, cap: float | None) -> None:
    """The kernels divide by temperature / softcap, or temperature / logit_scale: a number from 1e-6 to 1e6."""
    name, divisor = ("logit_scale", scale) if cap is None else ("softcap", cap)
    if not 1e-6 <= temperature / divisor <= 1e6:
        raise ValueError(
            f"{name}: expected temperature / {name} from 1e-6 to 1e6; got temperature {temperature:g} and {name} "
            f"{divisor:g}"
        )


def _temperatures(given: Tensor, token_ids: Tensor) -> Tensor:
    """As one per token; given one per token, one per row of a padded batch [B, 1], or one for all []."""
    checks.floats("temperature", checks.tensor("temperature", given, "a number, or one temperature per token"))
    checks.same_device("temperature", given, token_ids.device)
    if given.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "temperature: expected a constant, as no loss computes its gradient; got a tensor that requires one. Pass "
            "temperature.detach()"
        )
    tokens = token_ids.shape
    by_row = len(tokens) == 2 and given.shape == (tokens[0], 1)
    if given.ndim and given.shape != tokens and not by_row:
        remedy = (
            f"or {[tokens[0], 1]} (one per sequence: temperature[:, None])"
            if len(tokens) == 2
            else "where one per sequence is temperature.repeat_interleave(cu_seqlens.diff())"
        )
        raise ValueError(
            f"temperature: expected shape {list(tokens)} (one per token), {remedy}; got {list(given.shape)}"
        )
    return given.detach().expand(tokens)


def _as_rows(values: Tensor) -> Tensor:
    """[B, T], or [N] as [1, N]."""
    return (values if values.ndim == 2 else values[None]).contiguous()


def check_logits(logits: Any, token_ids: Any, overwrite_logits: bool, vocab_size: Any, shard: VocabShard | None) -> int:
    """Returns the size of the vocabulary."""
    checks.operand("logits", checks.tensor("logits", logits, "logits [.., vocabulary]"), "logits")
    checks.flag("overwrite_logits", overwrite_logits, "whether the gradient is written over the logits")
    if logits.ndim not in (2, 3):
        raise ValueError(
            "logits: expected [sequences, tokens, vocabulary] (padded) or [tokens, vocabulary] (packed); got "
            f"{list(logits.shape)}"
        )
    if logits.shape[-1] == 0 and shard is None:
        raise ValueError(f"logits: expected a vocabulary of at least one token; got {list(logits.shape)}")
    if overwrite_logits and checks.overlaps(logits):
        raise ValueError(
            "overwrite_logits: expected logits of which each has memory of its own; got a view with sizes "
            f"{list(logits.shape)} and strides {list(logits.stride())}, whose elements share memory (expanded, or "
            "windows that overlap). Pass its clone(), or overwrite_logits=False"
        )
    check_token_ids(token_ids, logits.shape[:-1], logits.device, "row of logits")
    return check_vocab_size(vocab_size, logits.shape[-1]) if shard is None else shard.vocab_size


def check_mask(mask: Any, token_ids: Tensor) -> Tensor | None:
    if mask is None:
        return None
    checks.shape("mask", checks.tensor("mask", mask, "True where a token counts"), token_ids.shape, "one per token")
    checks.same_device("mask", mask, token_ids.device)
    return as_bool("mask", mask)


def check_kept_tokens(kept: Any, token_ids: Tensor) -> None:
    """Refuses what is no `KeptTokens` of these rows; the operators look at the ids."""
    if kept is None:
        return
    if not isinstance(kept, KeptTokens):
        raise TypeError(
            f"kept: expected KeptTokens, or None for the whole vocabulary; got {checks.describe(kept)}. "
            "KeptTokens.from_lists makes one of a list of ids for each row"
        )
    rows = token_ids.numel()
    if len(kept) != rows:
        raise ValueError(
            f"kept: expected {rows} rows, one for each row of {list(token_ids.shape)} token_ids, masked ones included; "
            f"got {len(kept)}"
        )
    if kept.device != token_ids.device:
        raise ValueError(
            f"kept: expected KeptTokens on {token_ids.device}, where the other arguments are; got them on "
            f"{kept.device}. Pass kept.to({str(token_ids.device)!r})"
        )


def check_full_distribution(full_distribution: Any, kept: KeptTokens | None, overwrites_shard: bool = False) -> None:
    checks.flag("full_distribution", full_distribution, "whether to compute the full distribution's numbers, too")
    if kept is None and not full_distribution:
        raise ValueError("full_distribution: expected True without kept=; got False, and nothing else to compute")
    if kept is not None and full_distribution and overwrites_shard:
        raise ValueError(
            "overwrite_logits: expected False for two distributions (kept= and full_distribution=True) over a "
            "tp_group, whose gradients are added; got True"
        )


def check_token_ids(token_ids: Any, shape: torch.Size, device: torch.device, of_what: str) -> None:
    checks.tensor("token_ids", token_ids, "the token each row predicts")
    checks.integers("token_ids", token_ids, "the token each row predicts")
    checks.shape("token_ids", token_ids, shape, f"one per {of_what}; nothing is shifted inside")
    checks.same_device("token_ids", token_ids, device)


def check_vocab_size(vocab_size: Any, columns: int) -> int:
    """Returns the size of the vocabulary, for logits with this many columns."""
    if vocab_size is None:
        return columns
    size = checks.whole("vocab_size", vocab_size, "how many columns are tokens")
    if not 1 <= size <= columns:
        raise ValueError(f"vocab_size: expected from 1 to {columns}, the columns of the logits; got {size}")
    return size


def agree_on_rows(
    agreement: Agreement,
    arrays: RowArrays,
    vocab: int,
    shard: VocabShard | None,
    kept: KeptTokens | None,
    full_distribution: bool = True,
) -> None:
    """Checks values before ranks compare; over a vocabulary shard's group, all ranks have the same rows."""
    if not agreement.active:
        return
    token_ids, mask, temperature, tanh_scale = arrays
    check_ids_and_temperatures(token_ids, mask, temperature, vocab)  # the operators do, too late for other ranks
    if kept is not None:
        check_kept(token_ids, mask, kept.token_ids, kept.offsets, vocab)
    agreement.same({"kept (whether it is given)": kept is not None, "full_distribution": full_distribution})
    if shard is None:
        return
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    by_row = temperature if temperature.ndim else temperature.expand(token_ids.shape)
    group = shard.ranks.argument
    agreement.compare(group, "vocab_start", (shard.begin, shard.width, shard.vocab_size), _check_tiles)
    rows = {
        "token_ids (how many)": token_ids.numel(),
        "mask": fingerprint(counted),
        "token_ids": fingerprint(token_ids, mask),
        "softcap (as logit_scale / softcap)": None if tanh_scale is None else float(tanh_scale),
        "temperature (with logit_scale and softcap)": fingerprint(by_row, mask),
        "kept.offsets": None if kept is None else fingerprint(kept.offsets),
        "kept.token_ids": None if kept is None else fingerprint(kept.token_ids),
    }
    agreement.same(rows, over=group)


def _check_tiles(group: str, shards: dict[int, tuple[int, int, int]]) -> None:
    """Refuses shards (begin, width, vocab_size) of all ranks that are not the vocabulary side by side."""
    spans = [(begin, begin + width) for begin, width, _ in shards.values()]
    sizes = [size for *_, size in shards.values()]
    if len(set(sizes)) > 1 and len({width for _, width, _ in shards.values()}) == 1:
        raise ValueError(
            f"vocab_size: expected the same on every rank of {group}; got {', '.join(map(str, sizes))}, in the "
            "order of its ranks"
        )
    reached = 0
    for begin, end in sorted((begin, min(end, sizes[0])) for begin, end in spans):
        if begin >= end:  # nothing but padding
            continue
        if begin != reached:
            break
        reached = end
    else:
        if len(set(sizes)) == 1 and reached == sizes[0]:
            return
    listed = ", ".join(f"{begin} to {end}" for begin, end in spans)
    raise ValueError(
        f"vocab_start: expected shards that are, side by side, the {max(sizes)} columns of the vocabulary; got columns "
        f"{listed} of {group}'s ranks, in their order. Shards of unequal width need vocab_start, the first column of "
        "each, and vocab_size, the columns of all"
    )


def next_token_targets(input_ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Targets for a causal model's own logits, unsliced: row t of `model(input_ids).logits` predicts token t + 1.

    Args:
        input_ids: [B, T].
        mask: [B, T], True (or 1) at the tokens that count, such as those of a response; None: all.

    Returns: `(token_ids, mask)`, both rolled left by one; the last position, which predicts nothing, is False.
    """
    checks.integers("input_ids", checks.tensor("input_ids", input_ids, "token ids [B, T]"), "token ids")
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids: expected shape [sequences, tokens]; got {list(input_ids.shape)}")
    if mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    checks.shape("mask", checks.tensor("mask", mask, "True where a token counts"), input_ids.shape, "one per token")
    checks.same_device("mask", mask, input_ids.device)
    rolled = torch.roll(as_bool("mask", mask), -1, dims=1)
    rolled[:, -1:] = False
    return torch.roll(input_ids, -1, dims=1), rolled
