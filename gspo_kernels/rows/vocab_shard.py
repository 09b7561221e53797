"""Rows whose vocabulary is sharded: each rank's kernels read its own columns, and a few numbers per row are merged.

Rank r computes lse_r and H_r of its columns, and the log-probability l_r of one of them: the target if it has it, else
its first. All ranks gather these numbers, which give those of the whole row:

    lse = logsumexp_r lse_r,    H = sum_r q_r (H_r - log q_r),    log q_r = lse_r - lse
    log p_y = -softplus(d),     d = logsumexp of the others - z_y

where the others are those on the target's rank, log(exp(-l) - 1) above z_y, and all columns of the other ranks. No
near-equal numbers are subtracted, so a confident row keeps its digits. Where logits are so large that lse has no digits
beside the largest one, `log_share` takes them from the entropies.

The gradient needs no other rank. In the formula of csrc/row_math.h a rank without the target has the upstream
(0, g_H, g_lse - g_l), and the formula is then the same for all of its columns: the kernel may treat the first one as
the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base import checks
from ..base.autograd import first_derivative, refuse_second_backward
from ..base.collectives import Ranks, gather, ranks_of
from ..base.operators import Operator, save_values, saved_values
from . import operators
from .dispatch import Backend, by_name
from .types import ABSENT, RowOptions, Rows, RowStats, Upstream, empty_stats, log_share, stats_dtype


@dataclass(frozen=True)
class VocabShard:
    """This rank's columns: `begin` to `begin + width`. The first `columns` of them are tokens."""

    ranks: Ranks
    begin: int
    width: int
    vocab_size: int  # of all ranks, without padding

    @property
    def columns(self) -> int:
        return min(max(self.vocab_size - self.begin, 0), self.width)

    @property
    def usual_columns(self) -> int:
        """About how many columns a rank has; the same number on every rank."""
        return -(-self.vocab_size // self.ranks.size)

    def local_ids(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(whether this rank has the token, its column here or else the first one)."""
        column = token_ids - self.begin
        owns = (column >= 0) & (column < self.columns)
        return owns, torch.where(owns, column, 0)

    def local(self, rows: Rows) -> tuple[Tensor, Rows]:
        """(whether this rank has the token, the rows of its columns alone)."""
        owns, token_ids = self.local_ids(rows.token_ids)
        if rows.kept_ids is None:
            return owns, rows._replace(token_ids=token_ids, vocab_size=self.columns)
        token_ids = torch.where(owns | ~rows.has_entries(), token_ids, ABSENT)
        columns = rows.vocab_size if rows.kept_form == "gathered" else self.columns
        return owns, rows._replace(token_ids=token_ids, vocab_size=columns, kept_ids=self.local_kept(rows.kept_ids))

    def local_kept(self, ids: Tensor) -> Tensor:
        """The columns here of kept ids; `ABSENT` for those of other ranks, -1 where no rank has the column."""
        column, known = ids - self.begin, (ids >= 0) & (ids < self.vocab_size)
        elsewhere = torch.where(known, ABSENT, -1)
        return torch.where((column >= 0) & (column < self.columns), column, elsewhere).to(ids.dtype)


@dataclass(frozen=True)
class VocabularyShard:
    """A vocabulary that is sharded over ranks, as one value for `tp_group=`.

    Args:
        group: the ranks: a process group, or a mesh of one dimension.
        start: the first column of this rank, for shards of unequal width. None: shards have equal width.
        size: how many columns of all ranks together are tokens; those after them are padding. None: all are tokens.
    """

    group: Any
    start: int | None = None
    size: int | None = None


def vocabulary_of(tp_group: Any, vocab_start: Any, vocab_size: Any) -> VocabularyShard:
    """A caller's three arguments as one value; its group is None where the vocabulary is not sharded."""
    if not isinstance(tp_group, VocabularyShard):
        return VocabularyShard(tp_group, vocab_start, vocab_size)
    for name, value, field in (("vocab_start", vocab_start, "start"), ("vocab_size", vocab_size, "size")):
        if value is not None:
            raise ValueError(
                f"{name}: expected None, because tp_group=VocabularyShard(...) has a {field}; got {value!r}"
            )
    return tp_group


def tp_ranks(values: Any, dimension: int, vocabulary: VocabularyShard) -> Ranks | None:
    """The ranks that share the vocabulary, known before any argument is refused; a DTensor names them itself."""
    if checks.is_dtensor(values) and len(axes := _axes(values, dimension)) == 1:
        return ranks_of("tp_group", values.device_mesh.get_group(axes[0]))
    return ranks_of("tp_group", vocabulary.group)


def _axes(values: Any, dimension: int) -> list[int]:
    """The dimensions of its mesh over which a DTensor is sharded in this dimension."""
    from torch.distributed.tensor import Shard

    return [
        i for i, p in enumerate(values.placements)
        if type(p) is Shard and p.dim % values.ndim == dimension % values.ndim
    ]  # fmt: skip


def shard_of(name: str, values: Any, dimension: int, vocabulary: VocabularyShard) -> tuple[Any, VocabShard | None]:
    """This rank's part of logits or of a head as a plain tensor, and its shard; None: all columns are here.

    `dimension`: that of the vocabulary.
    """
    if checks.is_dtensor(values):
        return _of_dtensor(name, values, dimension, vocabulary)
    ranks = ranks_of("tp_group", vocabulary.group)
    if ranks is None:
        if vocabulary.start is not None:
            raise ValueError(f"vocab_start: expected None without a tp_group; got {vocabulary.start!r}")
        return values, None
    width = checks.tensor(name, values, "this rank's part of the vocabulary").shape[dimension]
    if vocabulary.start is None:
        begin, total = ranks.rank * width, ranks.size * width
    else:
        begin = checks.whole("vocab_start", vocabulary.start, "the first column that this rank has", at_least=0)
        total = None
        if vocabulary.size is None:
            raise ValueError("vocab_size: expected the size of the vocabulary, because vocab_start is given; got None")
    return values, VocabShard(ranks, begin, width, _vocabulary(vocabulary.size, total))


def _of_dtensor(name: str, values: Any, dimension: int, vocabulary: VocabularyShard) -> tuple[Any, VocabShard | None]:
    if vocabulary.start is not None:
        raise ValueError(f"vocab_start: expected None with {name} that are a DTensor, which has its own placement")
    sharded = _axes(values, dimension)
    others = [p for i, p in enumerate(values.placements) if i not in sharded and not p.is_replicate()]
    if others or len(sharded) > 1:
        raise ValueError(
            f"{name}: expected a DTensor that is sharded over the vocabulary, Shard({dimension}), in one dimension of "
            f"its mesh, and replicated in all others; got {values.placements}. Redistribute it first"
        )
    if not sharded:
        return values.to_local(), None
    mesh, (axis,) = values.device_mesh, sharded
    ranks = ranks_of("tp_group", mesh.get_group(axis))
    assert ranks is not None
    given = ranks_of("tp_group", vocabulary.group)
    if given is not None and given.name != ranks.name:
        raise ValueError(
            f"tp_group: expected None, or the group over which {name} are sharded as a DTensor; got another group"
        )
    columns = values.shape[dimension]
    begin = min(ranks.rank * -(-columns // ranks.size), columns)  # as DTensor splits: the last may be shorter, or empty
    local = values.to_local()
    return local, VocabShard(ranks, begin, local.shape[dimension], _vocabulary(vocabulary.size, columns))


def _vocabulary(vocab_size: Any, columns: int | None) -> int:
    if vocab_size is None:
        assert columns is not None
        return columns
    size = checks.whole("vocab_size", vocab_size, "how many columns of all ranks are tokens", at_least=1)
    if columns is not None and size > columns:
        raise ValueError(
            f"vocab_size: expected from 1 to {columns}, the columns of all ranks; got {size}. Either tp_group "
            "is not the group over which the vocabulary is sharded, or shards are of unequal width: then pass "
            "vocab_start"
        )
    return size


# ---- merging

_ELSEWHERE = 1.0  # marks a target of another rank: no log-probability is positive


def merged(
    local: RowStats | None, owns: Tensor, mask: Tensor | None, shard: VocabShard, dtype: torch.dtype
) -> RowStats:
    """Statistics of whole rows, in `dtype`, from those of this rank's columns; the same on every rank. One collective.

    `local` is None where all columns of this rank are padding.
    """
    if local is None:
        nothing = torch.zeros(owns.shape, dtype=dtype, device=owns.device)
        local = RowStats(nothing, nothing, torch.full_like(nothing, -torch.inf, dtype=torch.float64))
    of_owner = torch.where(owns, local.logprobs, _ELSEWHERE)
    lses, entropies, logprobs = _gathered(local.lse, local.entropy, of_owner, shard.ranks)
    most, of_most = lses.max(0)
    relative = log_share(lses, most, entropies, entropies.gather(0, of_most[None])[0], dtype)  # to the largest lse
    relative = torch.where(lses == -torch.inf, -torch.inf, relative)
    log_sum = torch.logsumexp(relative, 0)
    lse, log_shares = most + log_sum, relative - log_sum
    share = log_shares.exp()
    entropy = torch.where(share == 0, 0.0, share * (entropies - log_shares)).sum(0)

    owner = logprobs != _ELSEWHERE
    of_target = torch.where(owner, relative + logprobs, -torch.inf).amax(0)
    of_target = torch.where((owner & (lses == -torch.inf)).any(0), -torch.inf, of_target)
    beside = torch.where(logprobs == 0, -torch.inf, torch.log(-torch.expm1(logprobs)) - logprobs)
    d = torch.logsumexp(torch.where(owner, beside, relative - of_target), 0)
    d = torch.where((of_target == -torch.inf) & (lse > -torch.inf), torch.inf, d)
    d = torch.where(owner.any(0), d, torch.nan)  # a token id that is out of range, where nothing checks it
    logprob = -(d.clamp(min=0.0) + torch.log1p(torch.exp(-d.abs())))
    if mask is not None:
        logprob, entropy, lse = (torch.where(mask, x, 0.0) for x in (logprob, entropy, lse))
    return RowStats(logprob.to(dtype), entropy.to(dtype), lse)


def _gathered(lse: Tensor, entropy: Tensor, logprobs: Tensor, ranks: Ranks) -> tuple[Tensor, ...]:
    """Each as [ranks, ...] float64, by one collective: 16 bytes a row, where statistics are float32."""
    if entropy.dtype == torch.float64:
        return gather(torch.stack([lse, entropy, logprobs]), ranks).unbind(1)
    two = torch.stack([entropy, logprobs], -1).view(torch.float64)  # the bits of both, as one float64
    lses, pairs = gather(torch.stack([lse, two.squeeze(-1)]), ranks).unbind(1)
    entropies, of_targets = pairs.unsqueeze(-1).contiguous().view(torch.float32).double().unbind(-1)
    return lses, entropies, of_targets


def of_this_rank(
    stats: RowStats, upstream: Upstream, owns: Tensor, local: Rows, backend: Backend
) -> tuple[RowStats, Upstream]:
    """The whole rows' statistics and gradients as this rank's kernel takes them, in the shape of `owns`.

    Args:
        local: the rows of this rank's columns; a row's first one stands for a target of another rank.
    """
    logprobs = stats.logprobs
    if local.kept_form != "gathered":  # kernels do not read the log-probability of a token that is `ABSENT`
        logits = backend.scaled_logits(local, local.logits[..., 0]).reshape(owns.shape)
        own = log_share(logits, stats.lse, torch.zeros_like(logits), stats.entropy.double(), logprobs.dtype)
        logprobs = torch.where(owns, logprobs, own.to(logprobs.dtype))
    g_logprobs, g_lse = upstream.logprobs, upstream.lse
    if g_logprobs is not None:
        elsewhere = torch.where(owns, 0.0, -g_logprobs)
        g_lse = elsewhere if g_lse is None else (g_lse + elsewhere).to(g_lse.dtype)
        g_logprobs = torch.where(owns, g_logprobs, 0.0)
    return stats._replace(logprobs=logprobs), upstream._replace(logprobs=g_logprobs, lse=g_lse)


# ---- from logits


def _row_stats(rows: Rows, shard: VocabShard, options: RowOptions) -> RowStats:
    operators.check_values(rows)
    owns, local = shard.local(rows)
    found = by_name(options.backend).forward(local) if shard.columns else None
    return merged(found, owns, rows.mask, shard, stats_dtype(rows.logits.dtype))


def _save(ctx: Any, stats: RowStats, rows: Rows, shard: VocabShard, options: RowOptions) -> None:
    save_values(ctx, rows=rows, shard=shard, options=options, stats=stats)


def _gradient_of_stats(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, grad_lse: Tensor | None
) -> dict[str, Tensor | None]:
    saved = saved_values(ctx)
    rows, shard, options = saved["rows"], saved["shard"], saved["options"]
    if options.overwrite_logits:
        refuse_second_backward(ctx, operators.FROM_LOGITS)
    gradient = operators.gradient_buffer(rows.logits, options.overwrite_logits)
    if shard.columns == 0:
        with torch.no_grad():
            gradient.zero_()
        return {"logits": first_derivative(gradient, operators.FROM_LOGITS, rows.logits)}
    owns, local = shard.local(rows)
    upstream = Upstream(grad_logprobs, grad_entropy, grad_lse)
    stats, upstream = of_this_rank(saved["stats"], upstream, owns, local, by_name(options.backend))
    operators.row_gradient(local, stats, upstream, gradient, options.backend)
    connected = (rows.logits, grad_logprobs, grad_entropy, grad_lse)
    return {"logits": first_derivative(gradient, operators.FROM_LOGITS, *connected)}


# Statistics of whole rows from this rank's logits, differentiable. One collective, and none in the backward.
row_stats = Operator(
    "sharded_row_stats",
    _row_stats,
    fake=lambda rows, shard, options: empty_stats(rows),
    save=_save,
    backward=_gradient_of_stats,
    operands=("logits",),
)
