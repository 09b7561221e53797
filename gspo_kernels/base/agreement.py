"""Arguments over ranks: what one rank refuses, and what differs between ranks, is an error on every rank.

Where values may be read (on the CPU; on a GPU under GSPO_KERNELS_DEBUG=1), each rank sends one dictionary of its
arguments over its groups before the first collective of a loss, and all ranks come to the same verdict. Elsewhere a
rank that raises leaves the others waiting in their next collective until it times out.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from . import checks
from .collectives import Ranks, gather_objects
from .torch_internals import device_types_of

Check = Callable[[str, dict[int, Any]], None]  # of a group's argument and each rank's value; raises ValueError


class _Report(NamedTuple):
    """What a rank tells the others."""

    refuses: bool  # and explains it
    members: dict[str, list[int]]  # of its groups, by argument
    values: dict[str, dict[str, Any]]  # by argument and name


class Agreement:
    """A context for checks that raise; when it ends, ranks compare what they have added to it.

    with Agreement("logits", logits, tp, cp) as agreement:
        ...                                             # checks that raise
        if agreement.active:
            agreement.same({"beta": beta})              # on the ranks of all groups
    """

    def __init__(self, name: str, first: Any, tp: Ranks | None = None, cp: Ranks | None = None) -> None:
        """`first`: the caller's first argument, of this name; its device is that of the exchange."""
        groups = [] if torch.compiler.is_compiling() else [ranks for ranks in (cp, tp) if ranks is not None]
        if groups and not isinstance(first, Tensor):  # this rank refuses it; the others' is most likely there
            on_cpu = "cpu" in device_types_of(groups[0].group()) or not torch.cuda.is_available()
            first = torch.empty(0, device="cpu" if on_cpu else "cuda")
        self._groups = groups if groups and checks.may_read(first) else []
        if not self._groups:
            return
        self._device = first.device
        self._members = {ranks.argument: dist.get_process_group_ranks(ranks.group()) for ranks in self._groups}
        self._values: dict[str, dict[str, Any]] = {argument: {} for argument in self._members}
        self._checks: dict[str, Check] = {}
        self.same({f"{name}.dtype": str(first.dtype)})
        self.same({f"{name}.requires_grad": first.requires_grad and torch.is_grad_enabled()}, over="cp_group")
        sizes = {"tp_group": tp, "cp_group": cp}
        self.same({f"{argument} (how many ranks)": ranks.size if ranks else 0 for argument, ranks in sizes.items()})

    @property
    def active(self) -> bool:
        """Whether there are ranks to compare with, and values may be read."""
        return bool(self._groups)

    def same(self, values: dict[str, Any], over: str | None = None) -> None:
        """What must be equal on all ranks of one group or, without `over`, of every group."""
        for argument in self._values:
            if over in (None, argument):
                self._values[argument] |= values

    def compare(self, over: str, name: str, value: Any, check: Check) -> None:
        """`check` judges the values of all ranks of a group, where everything that was added before is the same."""
        self.same({name: value}, over)
        self._checks[name] = check

    def __enter__(self) -> Agreement:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.active or (error is not None and not isinstance(error, Exception)):  # an interrupt
            return
        mine: Exception | None = error
        both = sorted(set.intersection(*map(set, self._members.values())))
        if mine is None and len(self._groups) > 1 and len(both) > 1:
            mine = ValueError(f"cp_group: expected no rank but this one in tp_group too; got {_listed(both)} in both")
        reports: dict[int, _Report] = {}
        lost = set()  # groups whose exchange has failed
        # Two exchanges make a whole grid known. The third serves ranks whose neighbours were given other groups.
        for ranks in self._groups if len(self._groups) == 1 else [*self._groups, self._groups[0]]:
            reports[dist.get_rank()] = _Report(mine is not None, self._members, self._values)
            if ranks.argument in lost:
                continue
            try:
                for found in gather_objects(reports, ranks, self._device):
                    reports |= {rank: each for rank, each in found.items() if each.refuses or rank not in reports}
            except Exception as failure:
                lost.add(ranks.argument)
                mine = mine or RuntimeError(
                    f"{ranks.argument}: expected all of its ranks, {_listed(self._members[ranks.argument])}, in this "
                    "call; the exchange in which they compare their arguments failed, which is so where one has raised "
                    f"before it, or calls something else: {failure}"
                )
        if error is not None:
            return
        refusing = [rank for rank, report in reports.items() if report.refuses]
        verdict = mine or (self._explained_on(refusing) if refusing else self._difference(reports))
        if verdict is not None:
            raise verdict

    def _difference(self, reports: dict[int, _Report]) -> Exception | None:
        """What differs in a group of this rank or, told in short, in another group of the grid."""
        for argument, mine in self._members.items():
            groups = {tuple(report.members.get(argument, ())) for report in reports.values()}
            errors = {
                members: self._compared(argument, {rank: reports[rank].values[argument] for rank in members})
                for members in groups
                if members and reports.keys() >= set(members)
            }
            if own := errors.get(tuple(mine)):
                return own
            if elsewhere := [rank for members, error in errors.items() if error for rank in members]:
                return self._explained_on(elsewhere)
        return None

    def _compared(self, argument: str, found: dict[int, dict[str, Any]]) -> Exception | None:
        """Of one group, in the order of its ranks."""
        if len({tuple(values) for values in found.values()}) > 1:
            return ValueError(
                f"{argument}: expected the same function, with the same kinds of arguments, on every rank of the "
                f"group; got different ones on {_listed(list(found))}"
            )
        try:
            for name in next(iter(found.values())):
                values = {rank: of_rank[name] for rank, of_rank in found.items()}
                if name in self._checks:
                    self._checks[name](argument, values)
                elif len(set(values.values())) > 1:
                    texts = (f"{x:.10g}" if isinstance(x, float) else str(x) for x in values.values())
                    listed = ", ".join(f"{text} on rank {rank}" for rank, text in zip(values, texts, strict=True))
                    return ValueError(f"{name}: expected the same on every rank of {argument}; got {listed}")
        except ValueError as error:
            return error
        return None

    def _explained_on(self, others: list[int]) -> Exception:
        near = next((argument for argument, members in self._members.items() if set(members) & set(others)), "cp_group")
        return ValueError(
            f"{near}: expected arguments that every rank accepts; refused by, and explained on, "
            f"{_listed(sorted(others))}. Nothing was computed"
        )


def _listed(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def fingerprint(values: Tensor, mask: Tensor | None = None) -> str:
    """One text for equal arrays, of integers or of numbers as float64 has them. Masked values do not count."""
    values = values.detach().reshape(-1)
    if values.is_floating_point():
        values = values.double() + 0.0  # not -0.0
        values = torch.where(values.isnan(), torch.nan, values).view(torch.int64)
    values = values.long()
    if mask is not None:
        values = torch.where(mask.reshape(-1), values, 0)
    positions = torch.arange(1, values.numel() + 1, device=values.device)
    mixed = ((values ^ (values >> 32)) + positions * 0x9E3779B97F4A7C1) * 0x2545F4914F6CDD1D
    mixed = (mixed ^ (mixed >> 29)) * 0x369DEA0F31A53F85
    return f"an array with checksum {int((mixed ^ (mixed >> 32)).sum() % (1 << 50)):x}"
