"""Refusing together: where ranks check their arguments, what one of them refuses is an error on all of them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .collectives import Ranks, gather
from .rows.operators import check_ids_and_temperatures
from .rows.vocab_shard import VocabShard
from .torch_internals import device_types_of

if TYPE_CHECKING:
    from .losses.token_stage import TokenInputs

_NUMBERS = 40  # that ranks compare, at most


class Together:
    """Where arguments are checked: what one rank refuses is an error on every rank of its groups.

        with Together(logits, tp, cp) as together:
            ...                                          # checks that raise
            together.same(tp, beta=beta)                 # what must be equal on all ranks

    That takes collectives of its own, and reading what came: on the CPU always, on a GPU under GSPO_KERNELS_DEBUG=1.
    Elsewhere a rank that raises leaves the others in their next collective, until that times out.

    Every rank calls them in one order, whatever it found: numbers go over the second group, then over the first, and
    whether all is well over the second once more. Whoever shares no group with a rank hears of it from one that does.
    """

    def __init__(self, where: Any, *ranks: Ranks | None, name: str = "logits") -> None:
        """`where`: the first argument, `name`; its device is that of the collectives."""
        found = [] if torch.compiler.is_compiling() else [each for each in ranks if each is not None]
        if found and not isinstance(where, Tensor):  # which is refused; the others are told where they probably are
            where = torch.empty(0, device=_usual_device(found))
        self._ranks = found if found and checks.may_read(where) else []
        self.device = where.device if self._ranks else None
        self._same: dict[str, dict[str, _Number]] = {each.argument: {} for each in self._ranks}
        self._then: dict[str, list[Check]] = {each.argument: [] for each in self._ranks}
        self._shard: VocabShard | None = None
        self._lost: set[str] = set()  # groups whose collectives have failed
        for each in self._ranks:
            self.same(each, **{f"{name}.dtype": str(where.dtype)})
            if each.argument == "cp_group":
                wants = where.requires_grad and torch.is_grad_enabled()
                self.same(each, **{f"{name}.requires_grad (1: yes)": int(wants)})
            for other in ranks:
                if each is not other:
                    self.same(each, **{f"{_other(each)} (how many ranks)": 0 if other is None else other.size})

    @property
    def asks(self) -> bool:
        """Whether there is anybody to compare with, and values may be read."""
        return bool(self._ranks)

    def same(self, ranks: Ranks | None, **values: float | str | Print) -> None:
        """What must be equal on all of these ranks. Every rank names the same, in one order."""
        if ranks is not None and self.asks:
            self._same[ranks.argument] |= {name: _Number.of(value) for name, value in values.items()}

    def same_everywhere(self, **values: float | str | Print) -> None:
        """`same`, on the ranks of all groups."""
        for ranks in self._ranks:
            self.same(ranks, **values)

    def ranks_of(self, argument: str) -> list[Ranks]:
        """Those that compare, or none."""
        return [ranks for ranks in self._ranks if ranks.argument == argument]

    def tiles(self, shard: VocabShard) -> None:
        """The shards of all of its ranks must be the vocabulary."""
        self._shard = shard

    def then(self, ranks: Ranks | None, check: Check) -> None:
        """Called on all of these ranks, where they have agreed; what it raises, it raises on every one of them."""
        if ranks is not None and self.asks:
            self._then[ranks.argument].append(check)

    def __enter__(self) -> Together:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.asks or (error is not None and not isinstance(error, Exception)):  # an interrupt
            return
        said = _Said(error, dist.get_rank() if error else -1)
        if not error:
            said = _said_by(self._overlap)
        for ranks in reversed(self._ranks):
            said = self._told(ranks, said, self._same[ranks.argument])
            for check in self._then[ranks.argument]:
                if said.error is None:
                    said = self._exchanged(ranks, check)
        if len(self._ranks) > 1:
            said = self._told(self._ranks[-1], said, {})
        if error is None and said.error is not None:
            raise said.error

    def _told(self, ranks: Ranks, said: _Said, same: dict[str, _Number]) -> _Said:
        """What this rank refuses or, if nothing, what others do; and whether what must be the same is."""
        names = list(same)
        assert len(names) <= _NUMBERS
        shard = self._shard if same and self._shard and self._shard.ranks == ranks else None
        span = [shard.begin, shard.width, shard.vocab_size] if shard else [0, 0, 0]
        numbers = [said.by, _checksum(" ".join(names)), *span, *(each.value for each in same.values())]
        numbers += [0] * (_NUMBERS + 5 - len(numbers))

        def ask() -> None:
            mine = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            by_rank: list[list[float]] = gather(mine, ranks).tolist()
            explaining = sorted({int(of[0]) for of in by_rank if of[0] >= 0})
            if explaining:
                raise _Relayed(
                    f"{ranks.argument}: expected arguments that every rank accepts; refused by, and explained on, "
                    f"{_listed(explaining)}. Nothing was computed",
                    explaining[0],
                )
            members = dist.get_process_group_ranks(ranks.group())
            if len({of[1] for of in by_rank}) > 1:
                raise ValueError(
                    f"{ranks.argument}: expected the same function, with the same kinds of arguments, on every rank of "
                    f"the group; got others on {_listed(_differing(ranks, members, [of[1] for of in by_rank]))}"
                )
            if shard is not None:
                _check_tiles(shard, [[int(x) for x in of[2:5]] for of in by_rank])
            for k, name in enumerate(names, start=5):
                values = [of[k] for of in by_rank]
                if len(set(values)) > 1:
                    what = same[name].told(values, ranks.rank, members, _differing(ranks, members, values))
                    raise ValueError(f"{name}: expected the same on every rank of {ranks.argument}; got {what}")

        found = self._exchanged(ranks, ask)
        return found if said.error is None else said

    def _exchanged(self, ranks: Ranks, check: Check) -> _Said:
        """What `check`, which has a collective, says; a collective that fails is told like any other error."""
        if ranks.argument in self._lost:
            return _Said(None, -1)
        said = _said_by(check)
        if said.error is not None and not isinstance(said.error, ValueError):
            self._lost.add(ranks.argument)
            members = dist.get_process_group_ranks(ranks.group())
            error = RuntimeError(
                f"{ranks.argument}: expected all of its ranks, {_listed(members)}, in this call; the exchange in which "
                f"they compare their arguments failed, which is so where one has raised before it, or calls something "
                f"else: {said.error}"
            )
            error.__cause__ = said.error
            return _Said(error, said.by)
        return said

    def _overlap(self) -> None:
        """Tensor- and context-parallel ranks make a grid."""
        if len(self._ranks) > 1:
            first, second = (set(dist.get_process_group_ranks(ranks.group())) for ranks in self._ranks)
            if len(both := first & second) > 1:
                argument, other = (ranks.argument for ranks in reversed(self._ranks))
                raise ValueError(
                    f"{argument}: expected ranks of which this one alone is in {other} too; got {_listed(sorted(both))}"
                    " in both"
                )


Check = Callable[[], None]


class _Said(NamedTuple):
    """An error, and which rank, of all, has the whole story; -1 where there is none."""

    error: Exception | None
    by: int


class _Relayed(ValueError):
    """What this rank raises as a ValueError, because `by` raises."""

    def __init__(self, message: str, by: int) -> None:
        super().__init__(message)
        self.by = by


def _said_by(check: Check) -> _Said:
    try:
        check()
    except _Relayed as relayed:
        return _Said(ValueError(str(relayed)), relayed.by)
    except Exception as error:
        return _Said(error, dist.get_rank())
    return _Said(None, -1)


class Print(NamedTuple):
    """What stands for the content of an array: equal numbers for equal arrays, and hardly for others."""

    value: float


class _Number(NamedTuple):
    """What is compared, and how it is shown: None, as the number that it is."""

    value: float
    shown: str | None

    @classmethod
    def of(cls, value: float | str | Print) -> _Number:
        if isinstance(value, Print):
            return cls(value.value, "one array")
        return cls(_checksum(value), value) if isinstance(value, str) else cls(float(value), None)

    def told(self, values: list[float], rank: int, members: list[int], others: list[int]) -> str:
        if self.shown is None:
            of_ranks = (f"{value:.10g} on rank {member}" for value, member in zip(values, members, strict=True))
            return ", ".join(of_ranks)
        return f"{self.shown} on rank {members[rank]}, this one, and another on {_listed(others)}"


def _differing(ranks: Ranks, members: list[int], values: list[float]) -> list[int]:
    """Which ranks, of all, have another value than this one."""
    return [member for member, value in zip(members, values, strict=True) if value != values[ranks.rank]]


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _other(ranks: Ranks) -> str:
    return "tp_group" if ranks.argument == "cp_group" else "cp_group"


def _checksum(text: str) -> float:
    return float(zlib.crc32(text.encode()))


def _usual_device(found: list[Ranks]) -> torch.device:
    """Where a group's collectives are, for a rank whose arguments do not say it."""
    types = device_types_of(found[0].group())
    return torch.device("cpu" if "cpu" in types or not torch.cuda.is_available() else "cuda")


def fingerprint(values: Tensor, mask: Tensor | None = None) -> Print:
    """Of integers, or of numbers as float64 has them; where the mask is False they do not count."""
    values = values.detach().reshape(-1)
    if values.is_floating_point():
        values = values.double() + 0.0  # not -0.0
        values = torch.where(values.isnan(), torch.nan, values).view(torch.int64)
    values = values.long()
    if mask is not None:
        values = torch.where(mask.reshape(-1), values, 0)
    places = torch.arange(1, values.numel() + 1, device=values.device)
    mixed = ((values ^ (values >> 32)) + places * 0x9E3779B97F4A7C1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    return Print(float((mixed ^ (mixed >> 32)).sum() % (1 << 50)))


# ---- what ranks must agree about, where values may be read


def check_rows_together(
    together: Together,
    token_ids: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    vocab: int,
    shard: VocabShard | None,
) -> None:
    """Arrays as `Rows` has them. With `shard`, all ranks of its group have the same rows."""
    if not together.asks:
        return
    check_ids_and_temperatures(token_ids, mask, temperature, vocab)  # the operators do, too late for other ranks
    if shard is None:
        return
    counted = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
    by_row = temperature if temperature.ndim else temperature.expand(token_ids.shape)
    rows: dict[str, Any] = {
        "token_ids (how many)": token_ids.numel(),
        "mask": fingerprint(counted),
        "token_ids": fingerprint(token_ids, mask),
        "temperature": fingerprint(by_row, mask),
    }
    together.same(shard.ranks, **rows)
    together.tiles(shard)


def check_sequences_together(together: Together, inputs: TokenInputs) -> None:
    """All ranks of a context-parallel group have the same sequences, all of a tensor-parallel one the same numbers."""
    if not together.asks:
        return
    batch, objective, normalizer = inputs.batch, inputs.objective, inputs.normalizer
    kind = type(objective)
    named = kind.__module__ == __name__.rpartition(".")[0] + ".objectives"  # what others show may be an address
    options: dict[str, Any] = {
        "cu_seqlens (how many sequences, or rows of a padded batch)": batch.sequences,
        "objective": repr(objective) if named else f"{kind.__module__}.{kind.__qualname__}",
        "aggregation": inputs.aggregation,
        "normalizer": "None" if normalizer is None else f"{float(normalizer):.17g}",
        "kl_estimator": inputs.kl_estimator,
        "beta": inputs.beta,
        "entropy_coef": inputs.entropy_coef,
        "max_log_ratio": inputs.max_log_ratio,
        "old_logprobs (0: None, 1: given)": int(inputs.old_logprobs is not None),
        "ref_logprobs (0: None, 1: given)": int(inputs.ref_logprobs is not None),
        "importance_weights (0: None, 1: given)": int(inputs.importance_weights is not None),
        "advantages": _unit(inputs.advantages_per_token),
        "importance_weights": _unit(inputs.importance_weights_per_token),
    }
    together.same_everywhere(**options)
    layout = batch.layout()
    held, counted = layout.held, layout.mask
    arrays = {
        "advantages": (inputs.advantages, inputs.advantages_per_token),
        "old_logprobs": (inputs.old_logprobs, True),
        "ref_logprobs": (inputs.ref_logprobs, True),
        "importance_weights": (inputs.importance_weights, inputs.importance_weights_per_token),
    }
    for ranks in together.ranks_of("tp_group"):
        together.same(ranks, **{"cu_seqlens, mask (how long each sequence is)": fingerprint(layout.local_lengths)})
        for name, (values, per_token) in arrays.items():
            here = Print(0.0) if values is None else fingerprint(values, counted if per_token else held)
            together.same(ranks, **{f"{name} (where tokens count)": here})
    of_sequences = {name: x for name, (x, per_token) in arrays.items() if x is not None and not per_token}
    if of_sequences:
        together.then(batch.ranks, lambda: _check_sequence_arrays(batch.ranks, held, of_sequences))


def _unit(per_token: bool) -> str:
    return "one per token" if per_token else "one per sequence"


def _check_sequence_arrays(ranks: Ranks | None, held: Tensor, arrays: dict[str, Tensor]) -> None:
    """Of a sequence, ranks that have tokens of it have the same numbers. Arrays are [sequences]."""
    assert ranks is not None
    found = gather(torch.stack([held.double(), *(x.double() for x in arrays.values())]), ranks).cpu()
    has = found[:, 0] > 0
    first = has.int().argmax(0)  # the first rank that has it
    for k, name in enumerate(arrays, start=1):
        values = found[:, k]
        of_first = values.gather(0, first[None])
        wrong = has & (values != of_first) & ~(values.isnan() & of_first.isnan())
        for i in wrong.any(0).nonzero()[:1, 0].tolist():
            members = dist.get_process_group_ranks(ranks.group())
            listed = [f"{float(values[r, i]):g} on rank {members[r]}" for r in has[:, i].nonzero()[:, 0].tolist()]
            raise ValueError(
                f"{name}: expected the same number for a sequence on every rank of {ranks.argument} that has tokens of "
                f"it; got, for sequence {i}, {', '.join(listed)}"
            )


def _check_tiles(shard: VocabShard, found: list[list[int]]) -> None:
    """Whether the shards of all ranks are the vocabulary; of each `found` has begin, width and vocab_size."""
    spans = [(begin, begin + width) for begin, width, _ in found]
    sizes = [size for *_, size in found]
    even = len({width for _, width, _ in found}) == 1
    if len(set(sizes)) > 1 and even:
        raise ValueError(
            f"vocab_size: expected the same on every rank of {shard.ranks.argument}; got {', '.join(map(str, sizes))}, "
            "in the order of its ranks"
        )
    reached = 0
    for begin, end in sorted((begin, min(end, shard.vocab_size)) for begin, end in spans):
        if begin >= end:  # nothing but padding
            continue
        if begin != reached:
            break
        reached = end
    else:
        if len(set(sizes)) == 1 and reached == shard.vocab_size:
            return
    listed = ", ".join(f"{begin} to {end}" for begin, end in spans)
    raise ValueError(
        f"vocab_start: expected shards that are, side by side, the {max(sizes)} columns of the vocabulary; got columns "
        f"{listed} of {shard.ranks.argument}'s ranks, in their order. Shards of unequal width need vocab_start, the "
        "first column of each, and vocab_size, the columns of all"
    )
