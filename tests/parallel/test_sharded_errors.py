"""What one rank gets wrong, all ranks refuse, in time, and can go on.

A world is started once a test. Its ranks go through cases by name; after each the same world computes a good loss, for
which no collective may have been left half-done. Rank c * tp + t has part t of the vocabulary and part c of the tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import Refused, grid, refused
from test_errors import check_message
from torch import Tensor

import gspo_kernels
from gspo_kernels import VocabularyShard
from gspo_kernels.base.agreement import fingerprint

pytestmark = ranks.mark

VOCAB, WIDTH, TIMEOUT = 8, 4, 240.0
LENGTHS = ((2, 0, 3), (1, 4, 0))  # of each part of the tokens: of sequence 1 one has nothing, of sequence 2 the other
COUNT = 5  # tokens of each


@dataclass(frozen=True)
class At:
    """A rank and its groups."""

    rank: int
    tp: int
    cp: int
    tp_group: Any = None
    cp_group: Any = None

    @property
    def t(self) -> int:
        return self.rank % self.tp

    @property
    def c(self) -> int:
        return self.rank // self.tp


Given = dict[str, Any]


def given(at: At) -> Given:
    """The arguments of a good loss from logits."""
    generator = torch.Generator().manual_seed(at.c)
    columns = slice(at.t * VOCAB // at.tp, (at.t + 1) * VOCAB // at.tp)
    old = torch.randn(COUNT, generator=generator) - 2
    groups = {
        name: group for name, group, n in (("tp_group", at.tp_group, at.tp), ("cp_group", at.cp_group, at.cp)) if n > 1
    }
    return {
        "logits": torch.randn(COUNT, VOCAB, generator=generator)[:, columns].clone().requires_grad_(),
        "token_ids": torch.randint(5, (COUNT,), generator=generator),
        "advantages": torch.tensor([1.0, -0.5, 2.0]),
        "old_logprobs": old,
        "cu_seqlens": torch.tensor([0, *LENGTHS[at.c]]).cumsum(0),
        **groups,
    }


def given_hidden(at: At) -> Given:
    found = given(at)
    logits = found.pop("logits")
    generator = torch.Generator().manual_seed(7)
    whole = torch.randn(VOCAB, WIDTH, generator=generator)
    width = logits.shape[-1]
    found["weight"] = whole[at.t * width : (at.t + 1) * width].clone().requires_grad_()
    found["hidden"] = torch.randn(COUNT, WIDTH, generator=torch.Generator().manual_seed(at.c)).requires_grad_()
    return found


def given_logprobs(at: At) -> Given:
    found = given(at)
    del found["logits"], found["token_ids"]
    found["logprobs"] = (found["old_logprobs"] + 0.01).requires_grad_()
    return {name: x for name, x in found.items() if name != "tp_group"}


def without_sequences(found: Given) -> Given:
    return {
        name: x for name, x in found.items() if name not in ("advantages", "old_logprobs", "cu_seqlens", "cp_group")
    }


GIVEN: dict[str, Callable[[At], Given]] = {
    "gspo_loss": given,
    "grpo_loss": given,
    "linear_gspo_loss": given_hidden,
    "linear_grpo_loss": given_hidden,
    "policy_loss_from_logprobs": given_logprobs,
    "token_logprobs": lambda at: without_sequences(given(at)),
    "linear_token_logprobs": lambda at: without_sequences(given_hidden(at)),
}
LOSSES = ("gspo_loss", "linear_gspo_loss")


@dataclass(frozen=True)
class Case:
    """What is changed, on which ranks, and what they say; the others say who does."""

    change: Callable[[At, Given], Given]
    argument: str
    came: str  # a pattern
    where: tuple[int, ...] | None = None  # which ranks change it, and explain it; None: all
    kind: str = "ValueError"
    explained_by: tuple[int, ...] | None = None  # if by others; () by all
    functions: tuple[str, ...] = LOSSES
    to_do: str = ""  # a pattern: advice

    def explaining(self, world: int) -> tuple[int, ...]:
        chosen = self.where if self.explained_by is None else self.explained_by
        return chosen or tuple(range(world))


def to(**values: Any) -> Callable[[At, Given], Given]:
    return lambda at, found: values


def of(function: Callable[[At], Any], name: str) -> Callable[[At, Given], Given]:
    return lambda at, found: {name: function(at)}


def cut(columns: Callable[[At], tuple[int, int]], told: bool = True) -> Callable[[At, Given], Given]:
    """Another part of the vocabulary: the first column, and how many; told by vocab_start or not."""

    def change(at: At, found: Given) -> Given:
        first, width = columns(at)
        name, shape = ("logits", (COUNT, width)) if "logits" in found else ("weight", (width, WIDTH))
        more = {"vocab_start": first, "vocab_size": VOCAB} if told else {}
        return {name: torch.zeros(shape).requires_grad_(), **more}

    return change


# --- running cases ----------------------------------------------------------------------------------------------------


def called(function: str, found: Given) -> Any:
    return getattr(gspo_kernels, function)(**found)


def good(function: str, at: At) -> float:
    """A loss and its backward, that nothing is wrong with."""
    output = called(function, GIVEN[function](at))
    if function.endswith("token_logprobs"):
        return float(output.logprobs.detach().sum())
    output.loss.backward()
    return float(output.loss.detach())


def go(rank: int, tp: int, cp: int, table: str) -> dict[str, tuple[Refused | None, bool]]:
    """In a rank: how each case was refused, and whether a good loss was the same afterwards as it was before."""
    at = At(rank, tp, cp, *grid(rank, tp, cp))
    cases = TABLES[table]
    first = {function: good(function, at) for case in cases.values() for function in case.functions}
    found = {}
    for name, case in cases.items():
        for function in case.functions:
            arguments = GIVEN[function](at)
            if case.where is None or rank in case.where:
                arguments |= case.change(at, arguments)
            refusal = refused(lambda f=function, a=arguments: called(f, a))  # type: ignore[misc]
            found[f"{name}, {function}"] = (refusal, good(function, at) == first[function])
    return found


def check(world: int, table: str, found: list[dict[str, tuple[Refused | None, bool]]]) -> None:
    wrong = []
    for name, case in TABLES[table].items():
        for function in case.functions:
            key = f"{name}, {function}"
            explaining = case.explaining(world)
            for rank, of_rank in enumerate(found):
                refusal, went_on = of_rank[key]
                if refusal is None:
                    wrong.append(f"{key}: accepted on rank {rank}")
                    continue
                try:
                    assert went_on, "the world could not go on"
                    assert refusal.seconds < TIMEOUT, f"after {refusal.seconds} s"
                    if rank in explaining:
                        assert refusal.type == case.kind, refusal
                        assert refusal.message.startswith(case.argument), f"names not {case.argument} first"
                        assert "expected" in refusal.message
                        assert re.search(case.came, refusal.message), f"does not say what came: {case.came}"
                        assert re.search(case.to_do, refusal.message), f"does not say what to do: {case.to_do}"
                    else:
                        assert refusal.type == "ValueError"
                        check_message(ValueError(refusal.message), "_group", "Nothing was computed")
                        named = re.search(r"explained on, ranks? ([0-9, ]+)\. Nothing", refusal.message)
                        assert named, "names no rank"
                        listed = {int(x) for x in named[1].split(", ")}
                        assert listed and listed <= set(explaining), f"names {listed}"
                except AssertionError as error:
                    wrong.append(f"{key}, rank {rank}: {str(error).splitlines()[0]}: {refusal}")
    assert not wrong, "\n".join(wrong)


# --- a vocabulary over two ranks --------------------------------------------------------------------------------------


def fewer_rows(at: At, found: Given) -> Given:
    name = "logits" if "logits" in found else "hidden"
    rows = {k: found[k].detach()[:-1].clone() for k in (name, "token_ids", "old_logprobs") if k in found}
    rows[name].requires_grad_()
    return rows | ({"cu_seqlens": torch.tensor([0, 2, 2, 4])} if "cu_seqlens" in found else {})


def rows_as(convert: Callable[[Tensor], Any]) -> Callable[[At, Given], Given]:
    """Of logits or hidden states."""

    def change(at: At, found: Given) -> Given:
        name = "logits" if "logits" in found else "hidden"
        return {name: convert(found[name].detach())}

    return change


def another(name: str, index: int, value: float) -> Callable[[At, Given], Given]:
    def change(at: At, found: Given) -> Given:
        values: Tensor = found[name].clone()
        values[index] = value
        return {name: values}

    return change


def keeps(token: Callable[[At], int]) -> Callable[[At, Given], Given]:
    """Every row keeps the tokens that may be its own, and this one."""
    return lambda at, found: {"kept": gspo_kernels.KeptTokens.from_lists([[0, 1, 2, 3, 4, token(at)]] * COUNT)}


def mesh_of(at: At, *shape: int) -> Any:
    return dist.init_device_mesh("cpu", shape)


ALL = (*LOSSES, "token_logprobs", "linear_token_logprobs")
FROM_LOGITS = ("gspo_loss", "token_logprobs")
LINEAR = ("linear_gspo_loss", "linear_grpo_loss", "linear_token_logprobs")
SOME_WEIGHTS = torch.tensor([1.0, 2.0, 3.0])
REFERENCE = {"ref_logprobs": torch.full((COUNT,), -2.0)}

LOCAL = {  # what a rank finds by itself
    "advantages of another shape": ({"advantages": torch.ones(4)}, "advantages", "4"),
    "old_logprobs of another shape": ({"old_logprobs": torch.ones(2)}, "old_logprobs", "2"),
    "temperature zero": ({"temperature": 0.0}, "temperature", "0"),
    "cu_seqlens decreasing": ({"cu_seqlens": torch.tensor([0, 4, 2, COUNT])}, "cu_seqlens", "4, 2"),
    "aggregation unknown": ({"aggregation": "mean"}, "aggregation", "mean"),
}


def local(where: tuple[int, ...], functions: tuple[str, ...] = LOSSES) -> dict[str, Case]:
    found = {
        f"{name} on {where}": Case(to(**change), argument, came, where, functions=functions)
        for name, (change, argument, came) in LOCAL.items()
        if argument != "temperature" or "policy_loss_from_logprobs" not in functions
    }
    if "policy_loss_from_logprobs" not in functions:
        far = another("token_ids", 1, VOCAB)
        found[f"token_ids too large on {where}"] = Case(far, "token_ids", str(VOCAB), where, functions=functions)
        integers = rows_as(lambda x: x.long())
        found[f"integers on {where}"] = Case(integers, "", "int64", where, "TypeError", functions=functions)
    return found


TP = {
    **local((0,)),
    **local((1,)),
    "hidden no tensor": Case(to(hidden=[[0.0]]), "hidden", "list", (1,), "TypeError", functions=LINEAR),
    "a group too small": Case(
        lambda at, found: {"tp_group": at.cp_group, "vocab_size": VOCAB}, "vocab_size", "4.*got 8", functions=ALL,
        to_do="tp_group is not the group over which",
    ),
    "no member": Case(to(tp_group=dist.GroupMember.NON_GROUP_MEMBER), "tp_group", "member of", kind="TypeError"),
    "no group": Case(to(tp_group="tp"), "tp_group", "str 'tp'", kind="TypeError", functions=ALL),
    "a number": Case(to(tp_group=2), "tp_group", "int 2", kind="TypeError", functions=ALL),
    "two dimensions": Case(
        of(lambda at: mesh_of(at, 2, 1), "tp_group"), "tp_group", "mesh of 2", to_do=r"mesh\['tp'\]"
    ),
    "a gap": Case(cut(lambda at: (at.t * 5, 3)), "vocab_start", "0 to 3, 5 to 8", functions=ALL),
    "an overlap": Case(cut(lambda at: (at.t * 3, 5)), "vocab_start", "0 to 5, 3 to 8", functions=ALL),
    "one start": Case(cut(lambda at: (0, 4)), "vocab_start", "0 to 4, 0 to 4"),
    "not from 0": Case(cut(lambda at: (4 * at.t + 1, 4)), "vocab_start", "1 to 5, 5 to 9"),
    "too few": Case(cut(lambda at: (at.t * 3, 3)), "vocab_start", "the 8 columns.*0 to 3, 3 to 6"),
    "a gap before padding": Case(cut(lambda at: (at.t * 8, 6)), "vocab_start", "0 to 6, 8 to 14"),
    "unequal, not told": Case(
        cut(lambda at: (0, 6 + at.t), told=False), "vocab_start", "0 to 6, 7 to 14", functions=ALL,
        to_do="unequal width need vocab_start",
    ),
    "vocab_start alone": Case(to(vocab_start=0, vocab_size=8, tp_group=None), "vocab_start", "got 0", functions=ALL),
    "a size beside one value": Case(
        lambda at, found: {"tp_group": VocabularyShard(at.tp_group), "vocab_size": VOCAB}, "vocab_size",
        "has a size; got 8", functions=ALL, to_do=r"VocabularyShard\(",
    ),
    "a start beside one value": Case(
        lambda at, found: {"tp_group": VocabularyShard(at.tp_group, 0, VOCAB), "vocab_start": 0}, "vocab_start",
        "has a start; got 0", functions=ALL, to_do=r"VocabularyShard\(",
    ),
    "a start without a size": Case(
        lambda at, found: {"tp_group": VocabularyShard(at.tp_group, 0)}, "vocab_size", "None", functions=ALL
    ),
    "a value that holds no group": Case(
        to(tp_group=VocabularyShard("tp")), "tp_group", "str 'tp'", kind="TypeError", functions=ALL
    ),
    "vocab_start, no size": Case(to(vocab_start=0), "vocab_size", "None", functions=ALL),
    "vocab_size differs": Case(to(vocab_size=7), "vocab_size", "7", (1,), explained_by=(), functions=ALL),
    "rows differ in number": Case(
        fewer_rows, "token_ids", "5 on rank 0, 4 on rank 1", (1,), explained_by=(), functions=ALL
    ),
    "other token_ids": Case(another("token_ids", 1, 5), "token_ids", "rank [01]", (0,), explained_by=(), functions=ALL),
    "another mask": Case(
        to(mask=torch.arange(COUNT) > 0), "mask", "rank [01]", (1,), explained_by=(), functions=ALL
    ),
    "another temperature": Case(to(temperature=2.0), "temperature", "rank", (1,), explained_by=(), functions=ALL),
    "another softcap": Case(to(softcap=30.0), "softcap", "None on rank 0", (1,), explained_by=(), functions=ALL),
    "another kept set": Case(keeps(lambda at: 5 + at.t), "kept.token_ids", "rank", functions=FROM_LOGITS),
    "kept on one rank": Case(
        keeps(lambda at: 5), "kept", "True on rank 0", (0,), explained_by=(), functions=FROM_LOGITS
    ),
    "one distribution on one rank": Case(
        lambda at, found: {**keeps(lambda at: 5)(at, found), "full_distribution": at.t == 0}, "full_distribution",
        "True on rank 0, False on rank 1", explained_by=(), functions=("token_logprobs", "linear_token_logprobs"),
    ),
    "kept beyond the vocabulary": Case(keeps(lambda at: VOCAB), "kept", f"got {VOCAB}", functions=FROM_LOGITS),
    "other advantages": Case(another("advantages", 0, 3.0), "advantages", "rank", (1,), explained_by=()),
    "advantages of the other sign": Case(another("advantages", 0, -1.0), "advantages", "rank", (1,), explained_by=()),
    "other old_logprobs": Case(another("old_logprobs", 2, -9.0), "old_logprobs", "rank", (1,), explained_by=()),
    "other sequences": Case(to(cu_seqlens=torch.tensor([0, 1, 3, 5])), "cu_seqlens", "rank", (1,), explained_by=()),
    "another clip range": Case(to(eps_low=0.3), "objective", "eps_low", (0,), explained_by=()),
    "another normalizer": Case(to(normalizer=3.0), "normalizer", "3|None", (0,), explained_by=()),
    "another dtype": Case(rows_as(lambda x: x.double()), "", "float", (1,), explained_by=()),
    "chunk_bytes": Case(to(chunk_bytes=64), "chunk_bytes", "64|None", (1,), explained_by=(), functions=LINEAR),
    "requires_grad": Case(
        lambda at, found: {"weight": found["weight"].detach()}, "",
        "requires_grad.*True, False, False, False, False on rank 1", (1,), explained_by=(), functions=LINEAR,
    ),
}  # fmt: skip

# --- the tokens of each sequence over two ranks -----------------------------------------------------------------------

FROM_LOGPROBS = (*LOSSES, "policy_loss_from_logprobs")


def as_padded(at: At, found: Given) -> Given:
    """Of two and of three sequences."""
    sequences = 2 + at.c
    return {
        "logits": torch.zeros(sequences, 2, VOCAB), "token_ids": torch.zeros(sequences, 2).long(),
        "advantages": torch.ones(sequences), "old_logprobs": None, "cu_seqlens": None,
    }  # fmt: skip


CP = {
    **local((0,), LOSSES),
    **local((1,), ("policy_loss_from_logprobs", "grpo_loss")),
    "no tensor": Case(
        to(logprobs=[0.0]), "logprobs", "list", (1,), "TypeError", functions=("policy_loss_from_logprobs",)
    ),
    "no member": Case(
        to(cp_group=dist.GroupMember.NON_GROUP_MEMBER), "cp_group", "member of", kind="TypeError",
        functions=FROM_LOGPROBS
    ),
    "no group": Case(to(cp_group=[0, 1]), "cp_group", r"list \[0, 1\]", kind="TypeError", functions=FROM_LOGPROBS),
    "two dimensions": Case(of(lambda at: mesh_of(at, 1, 2), "cp_group"), "cp_group", "mesh of 2"),
    "sequences differ in number": Case(
        to(cu_seqlens=torch.tensor([0, 1, 5]), advantages=torch.ones(2)), "cu_seqlens", "3 on rank 0, 2 on rank 1",
        (1,),
        explained_by=(), functions=FROM_LOGPROBS,
    ),
    "rows of a padded batch": Case(as_padded, "cu_seqlens", "2 on rank 0, 3 on rank 1", functions=("gspo_loss",)),
    "other advantages": Case(
        another("advantages", 0, 9.0), "advantages", "for sequence 0, 1 on rank 0, 9 on rank 1", (1,), explained_by=(),
        functions=(*FROM_LOGPROBS, "grpo_loss", "linear_grpo_loss"),
    ),
    "NaN on one rank": Case(
        another("advantages", 0, math.nan), "advantages", "nan on rank 0, 1 on rank 1", (0,), explained_by=()
    ),
    "other weights": Case(
        lambda at, found: {"importance_weights": SOME_WEIGHTS + torch.tensor([at.c, 0, 0])}, "importance_weights",
        "1 on rank 0, 2 on rank 1",
        functions=FROM_LOGPROBS,
    ),
    "group_tokens of a sequence of which one rank has nothing": Case(
        lambda at, found: {"aggregation": "group_mean", "group_tokens": torch.tensor([9, 9 + at.c, 9])}, "group_tokens",
        "for sequence 1, 9 on rank 0, 10 on rank 1",
        functions=FROM_LOGPROBS,
    ),
    "weights on one rank": Case(
        to(importance_weights=SOME_WEIGHTS), "importance_weights", "one per sequence on rank 0, None on rank 1", (0,),
        explained_by=(),
    ),
    "weights of two kinds": Case(
        lambda at, found: {"importance_weights": torch.ones(COUNT if at.c else 3)}, "importance_weights", "one per",
        functions=FROM_LOGPROBS,
    ),
    "advantages of two kinds": Case(
        to(advantages=torch.ones(COUNT)), "advantages", "one per", (1,), explained_by=(), functions=("grpo_loss",)
    ),
    "another aggregation": Case(
        to(aggregation="token_mean"), "aggregation", "token_mean|sequence_mean", (1,), explained_by=(),
        functions=FROM_LOGPROBS,
    ),
    "another normalizer": Case(to(normalizer=5), "normalizer", "5|None", (1,), explained_by=()),
    "on-policy on one rank": Case(
        to(old_logprobs=None), "old_logprobs", "one per token on rank 0, None on rank 1", (1,), explained_by=()
    ),
    "another clip range": Case(
        to(dual_clip=3.0), "objective", "dual_clip", (0,), explained_by=(), functions=("grpo_loss",)
    ),
    "an entropy bonus on one rank": Case(to(entropy_coef=0.1), "entropy_coef", "0.1 on rank 1", (1,), explained_by=()),
    "a KL term on one rank": Case(to(beta=0.1, **REFERENCE), "beta", "0.1 on rank 1", (1,), explained_by=()),
    "requires_grad": Case(
        rows_as(lambda x: x), "", "requires_grad", (1,), explained_by=(), functions=LOSSES
    ),
    "another dtype": Case(rows_as(lambda x: x.double().requires_grad_()), "", "float", (1,), explained_by=()),
    "chunk_bytes": Case(
        to(chunk_bytes=64), "chunk_bytes", "64|None", (1,), explained_by=(), functions=("linear_gspo_loss",
        "linear_grpo_loss")
    ),
}  # fmt: skip

# --- both -------------------------------------------------------------------------------------------------------------

GRID = {
    **{key: case for rank in range(4) for key, case in local((rank,), (LOSSES[rank % 2],)).items()},
    **local((0, 3), ("gspo_loss",)),
    "shards of one row overlap": Case(cut(lambda at: (0, 4)), "vocab_start", "0 to 4, 0 to 4", (2, 3)),
    "token_ids on one rank": Case(another("token_ids", 1, 5), "token_ids", "rank", (3,), explained_by=(2, 3)),
    "sequences on one rank": Case(
        to(cu_seqlens=torch.tensor([0, 1, 5]), advantages=torch.ones(2)), "cu_seqlens", "3 on rank 1, 2 on rank 3",
        (3,),
        explained_by=(1, 3),
    ),
    "advantages on one rank": Case(
        another("advantages", 0, 9.0), "advantages", "9 on rank 0, 1 on rank 2", (0,), explained_by=(0, 2)
    ),
    "advantages on one part": Case(
        another("advantages", 0, 9.0), "advantages", "9 on rank [23]", (2, 3), explained_by=()
    ),
    "advantages of one's own": Case(another("advantages", 2, 9.0), "advantages", "rank", (1,), explained_by=(0, 1)),
    "shards and advantages": Case(
        lambda at, found: cut(lambda at: (0, 4))(at, found) if at.c else another("advantages", 0, 9.0)(at, found),
        "", "rank|columns", (0, 2, 3), explained_by=(0, 1, 2, 3),
    ),
    "one group twice": Case(
        lambda at, found: {"cp_group": at.tp_group}, "cp_group", "ranks 0, 1 in both|ranks 2, 3 in both"
    ),
    "everybody": Case(lambda at, found: {"cp_group": dist.group.WORLD}, "cp_group", "ranks (0, 1|2, 3) in both"),
    "two dimensions": Case(of(lambda at: mesh_of(at, 2, 2), "tp_group"), "tp_group", "mesh of 2"),
}  # fmt: skip

# --- DTensors ---------------------------------------------------------------------------------------------------------


def dtensor(at: At, local: Tensor, *placements: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local.detach(), dist.DeviceMesh.from_group(at.tp_group, "cpu"), placements)


def placed(kind: str, name: str = "logits", **more: Any) -> Callable[[At, Given], Given]:
    def change(at: At, found: Given) -> Given:
        from torch.distributed.tensor import Partial, Replicate, Shard

        placement = {"rows": Shard(0), "columns": Shard(1), "partial": Partial(), "replicated": Replicate()}[kind]
        return {name: dtensor(at, found[name], placement), "tp_group": None, **more}

    return change


ONLY_LOGITS, ONLY_LINEAR = ("gspo_loss", "token_logprobs"), ("linear_gspo_loss", "linear_token_logprobs")
DTENSORS = {
    "rows": Case(placed("rows"), "logits", r"Shard\(dim=0\)", functions=ONLY_LOGITS, to_do="Redistribute"),
    "partial": Case(placed("partial"), "logits", "Partial", functions=ONLY_LOGITS, to_do="Redistribute"),
    "vocab_start": Case(
        placed("columns", vocab_start=0, vocab_size=8), "vocab_start", "DTensor", functions=ONLY_LOGITS
    ),
    "vocab_size too large": Case(placed("columns", vocab_size=9), "vocab_size", "8.*got 9", functions=ONLY_LOGITS),
    "another group": Case(
        lambda at, found: {**placed("columns")(at, found), "tp_group": dist.group.WORLD}, "tp_group", "another group",
        functions=ONLY_LOGITS,
    ),
    "FSDP's": Case(
        placed("rows", "weight"), "weight", "DTensor", kind="TypeError", functions=ONLY_LINEAR,
        to_do=r"FSDP.*full_tensor\(\).*tp_group",
    ),
    "width": Case(
        lambda at, found: {**placed("columns", "weight")(at, found), "tp_group": at.tp_group}, "weight",
        r"Shard\(dim=1\)", functions=ONLY_LINEAR, to_do="Redistribute",
    ),
    "a plain bias": Case(
        lambda at, found: {**placed("rows", "weight")(at, found), "tp_group": at.tp_group, "bias": torch.zeros(4)},
        "bias", "tensor of shape", kind="TypeError", functions=ONLY_LINEAR,
    ),
}  # fmt: skip

# --- what is checked before ranks tell each other -----------------------------------------------------------

EARLY = {
    "logits no tensor": Case(to(logits=[[0.0]]), "logits", "list", (1,), "TypeError", functions=ONLY_LOGITS),
    "vocab_size too large": Case(to(vocab_size=9), "vocab_size", "got 9", (0,), functions=ALL),
    "vocab_size a float": Case(to(vocab_size=8.0), "vocab_size", "8.0", (1,), "TypeError", functions=ALL),
    "vocab_start negative": Case(to(vocab_start=-1, vocab_size=8), "vocab_start", "-1", (1,), functions=ALL),
    "weight no tensor": Case(to(weight=None), "weight", "None", (1,), "TypeError", functions=ONLY_LINEAR),
    "a backend that cannot": Case(
        lambda at, found: {
            "logits": torch.zeros(COUNT, 8).double(), "vocab_start": 8 * at.t, "vocab_size": 8, "backend": "native"
        },
        "backend", "float64", functions=ONLY_LOGITS,
    ),  # one rank has nothing but padding, and runs none
    "a backend on one rank": Case(
        lambda at, found: {**found, **rows_as(lambda x: x.double())(at, found), "backend": "native"}, "backend",
        "float64", (1,), functions=ALL,
    ),
    "another width": Case(
        lambda at, found: {
            "hidden": torch.zeros(COUNT, 3).requires_grad_(), "weight": torch.zeros(4, 3).requires_grad_()
        }, "hidden", "4 on rank 0, 3 on rank 1", (1,),
        explained_by=(), functions=("linear_token_logprobs",),
    ),
    "skip_zero_advantage": Case(
        to(skip_zero_advantage=True), "skip_zero_advantage", "True on rank 1", (1,), explained_by=(),
        functions=("linear_gspo_loss",),
    ),
}  # fmt: skip

TABLES = {"tp": TP, "cp": CP, "grid": GRID, "dtensors": DTENSORS, "early": EARLY}
WORLDS = {"tp": (2, 1), "cp": (1, 2), "grid": (2, 2), "dtensors": (2, 1), "early": (2, 1)}


@pytest.mark.parametrize("table", TABLES)
def test_what_one_rank_gets_wrong_all_refuse(table: str) -> None:
    tp, cp = WORLDS[table]
    check(tp * cp, table, ranks.run(tp * cp, go, tp, cp, table, timeout=TIMEOUT))


# --- what is fine -----------------------------------------------------------------------------------------------------


def fine(rank: int) -> dict[str, tuple[float, float]]:
    """In a rank of 2 x 2: losses of two calls that are the same."""
    at = At(rank, 2, 2, *grid(rank, 2, 2))
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
    nothing = torch.tensor([LENGTHS[at.c][i] == 0 for i in range(3)])

    def garbage(values: Tensor, value: float) -> Tensor:
        return torch.where(nothing, value, values)

    def loss(function: str, **change: Any) -> float:
        return float(called(function, GIVEN[function](at) | change).loss.detach())

    found = {}
    for function in (*LOSSES, "grpo_loss", "linear_grpo_loss"):
        expected = loss(function)
        weighted = loss(function, importance_weights=SOME_WEIGHTS)
        found[f"meshes, {function}"] = (loss(function, tp_group=mesh["tp"], cp_group=mesh["cp"]), expected)
        for value in (math.nan, math.inf, 5.0 + at.c):
            advantages, weights = garbage(given(at)["advantages"], value), garbage(SOME_WEIGHTS, value)
            found[f"advantages {value}, {function}"] = (loss(function, advantages=advantages), expected)
            found[f"weights {value}, {function}"] = (loss(function, importance_weights=weights), weighted)
        everything = torch.ones(COUNT, dtype=torch.bool)
        masked = loss(function, **({"mask": everything} if at.t else {}))
        found[f"a mask of nothing on one rank, {function}"] = (masked, expected)
        shard = VocabularyShard(at.tp_group, at.t * VOCAB // 2, VOCAB)
        found[f"one value for the shard, {function}"] = (loss(function, tp_group=shard), expected)
        even = VocabularyShard(mesh["tp"])
        found[f"one value for an even shard, {function}"] = (loss(function, tp_group=even), expected)
        tensor = torch.tensor(3.0)
        found[f"a normalizer of either kind, {function}"] = (
            loss(function, normalizer=tensor if at.c else 3.0), loss(function, normalizer=3.0)
        )  # fmt: skip
    for function in ("token_logprobs", "linear_token_logprobs"):
        plain, with_shard = (
            called(function, GIVEN[function](at) | change).logprobs.detach().sum()
            for change in ({}, {"tp_group": VocabularyShard(at.tp_group, at.t * VOCAB // 2, VOCAB)})
        )
        found[f"one value for the shard, {function}"] = (float(with_shard), float(plain))
    return found


def test_what_is_fine() -> None:
    """A sequence's numbers on a rank that has no token of it are not looked at; a mesh is as good as its group."""
    for rank, found in enumerate(ranks.run(4, fine, timeout=TIMEOUT)):
        assert len(found) == 46
        for name, (loss, expected) in found.items():
            assert math.isfinite(loss) and loss == expected, f"{name}, rank {rank}"


# --- ranks that do not come -------------------------------------------------------------------------------------------

SOON = 3.0  # seconds; connecting takes less, also on a busy machine
LONELY = [  # what rank 1 does, what rank 0 calls, over which group
    ("raises", "gspo_loss", "tp_group"),
    ("raises", "linear_gspo_loss", "cp_group"),
    ("calls alone", "linear_gspo_loss", "cp_group"),
    ("is not there where rank 0 refuses", "gspo_loss", "cp_group"),
]


def groups_of(rank: int, tp: int, cp: int) -> list[Any]:
    """As those of `grid`, but they give up soon."""
    soon = timedelta(seconds=SOON)
    rows = [dist.new_group([c * tp + t for t in range(tp)], timeout=soon) for c in range(cp)]
    columns = [dist.new_group([c * tp + t for c in range(cp)], timeout=soon) for t in range(tp)]
    return [rows[rank // tp], columns[rank % tp]]


def left_alone(rank: int) -> list[Refused | None]:
    """In a rank of two. Each time groups are new, for those that have failed may do so again."""
    found = []
    for what, function, argument in LONELY:
        tp, cp = (2, 1) if argument == "tp_group" else (1, 2)
        at = At(rank, tp, cp, *groups_of(rank, tp, cp))
        arguments = GIVEN[function](at)
        if what == "calls alone" and rank == 1:
            arguments["cp_group"] = None
        if what == "is not there where rank 0 refuses":
            arguments["advantages"] = torch.ones(4)
        came = rank == 0 or what == "calls alone"
        found.append(refused(lambda f=function, a=arguments: called(f, a)) if came else None)  # type: ignore[misc]
        dist.barrier()
    return found


def gives_up(refusal: Refused | None, pattern: str) -> None:
    assert refusal is not None and refusal.type == "RuntimeError", refusal
    assert re.match(pattern, refusal.message), refusal
    assert "raised before" in refusal.message and "imed out" in refusal.message, refusal


def test_a_rank_that_is_left_alone_gives_up_and_says_so() -> None:
    """And what it refuses itself it says, not that nobody heard it."""
    alone, other = ranks.run(2, left_alone, timeout=TIMEOUT)
    for (what, _, argument), refusal in zip(LONELY, alone, strict=True):
        assert refusal is not None and refusal.seconds < TIMEOUT, refusal
        if what == "is not there where rank 0 refuses":
            assert refusal.type == "ValueError" and refusal.message.startswith("advantages: expected"), refusal
        else:
            gives_up(refusal, f"{argument}: expected all of its ranks, ranks 0, 1, in this call")
    assert all(refusal is None for refusal in other)


def left_alone_in_a_grid(rank: int) -> Refused | None:
    at = At(rank, 2, 2, *groups_of(rank, 2, 2))
    found = refused(lambda: called("gspo_loss", given(at))) if rank != 3 else None
    dist.barrier()
    return found


def test_of_a_grid_nobody_hangs_for_a_rank_that_does_not_come() -> None:
    """Also who shares no group with it: by then its own peers have heard of nobody, or gone."""
    found = ranks.run(4, left_alone_in_a_grid, timeout=TIMEOUT)
    for rank, refusal in enumerate(found[:3]):
        assert refusal is not None and refusal.seconds < TIMEOUT, f"rank {rank}: {refusal}"
        assert refusal.message.startswith(("cp_group: expected", "tp_group: expected")), f"rank {rank}: {refusal}"


def half_of_a_grid_forgets_a_group(rank: int) -> Refused | None:
    at = At(rank, 2, 2, *groups_of(rank, 2, 2))
    arguments = given(at)
    if rank >= 2:
        arguments |= {"tp_group": None, "token_ids": torch.zeros_like(arguments["token_ids"])}
    found = refused(lambda: called("gspo_loss", arguments))
    dist.barrier()
    return found


def test_ranks_that_forget_a_group_are_told_at_once() -> None:
    for rank, refusal in enumerate(ranks.run(4, half_of_a_grid_forgets_a_group, timeout=TIMEOUT)):
        assert refusal is not None and refusal.seconds < SOON, f"rank {rank}: {refusal}"
        assert refusal.type == "ValueError" and refusal.message.startswith("tp_group (how many ranks)"), refusal


# --- counts and stats over ranks --------------------------------------------------------------------------------------


def counts(rank: int) -> dict[str, tuple[Refused | None, str, str, str]]:
    """In a rank: how each call was refused, and how it should be; no collective takes place."""
    own, _ = grid(rank, 2, 1)
    mask = torch.ones(2, 3, dtype=torch.bool)
    stats = gspo_kernels.policy_loss_from_logprobs(torch.zeros(2, 3), torch.ones(2)).stats
    mesh = dist.init_device_mesh("cpu", (2, 1))
    outside = dist.GroupMember.NON_GROUP_MEMBER
    count = gspo_kernels.global_count
    calls: dict[str, tuple[Callable[[], object], str, str, str]] = {
        "over None": (lambda: stats.over(None), "TypeError", "group", "None"),
        "over text": (lambda: stats.over("dp"), "TypeError", "group", "str 'dp'"),
        "over no member": (lambda: stats.over(outside), "TypeError", "group", "member of"),
        "over a mesh": (lambda: stats.over(mesh), "ValueError", "group", "mesh of 2"),
        "a list": (lambda: count([[True]], group=own), "TypeError", "mask", "list"),  # type: ignore[arg-type]
        "packed": (lambda: count(mask[0], group=own), "ValueError", "cu_seqlens", "None"),
        "boundaries": (
            lambda: count(mask[0], torch.tensor([0, 2]), group=own), "ValueError", "cu_seqlens", r"\[0, 2\]"
        ),
        "padded": (lambda: count(mask, torch.tensor([0, 6]), group=own), "ValueError", "cu_seqlens", "2, 3"),
        "complex": (lambda: count(mask.to(torch.complex64), group=own), "TypeError", "mask", "complex64"),
        "aggregation": (lambda: count(mask, aggregation="mean", group=own), "ValueError", "aggregation", "'mean'"),
        "averaged": (lambda: count(mask, averaged=True), "ValueError", "group", "None"),
        "no group": (lambda: count(mask, group=0), "TypeError", "group", "int 0"),
        "no member": (lambda: count(mask, group=outside), "TypeError", "group", "member of"),
        "no cp_group": (lambda: count(mask, group=own, cp_group="cp"), "TypeError", "cp_group", "str 'cp'"),
        "a mesh": (lambda: count(mask, group=own, cp_group=mesh), "ValueError", "cp_group", "mesh of 2"),
    }  # fmt: skip
    found = {}
    for name, (call, *expected) in calls.items():
        found[name] = (refused(call), *expected)
        assert float(count(mask, group=own)) == 4
        assert float(stats.over(own).num_tokens) == 12
    return found  # type: ignore[return-value]


def test_counts_and_stats_refuse() -> None:
    for found in ranks.run(2, counts, timeout=TIMEOUT):
        for name, (refusal, kind, argument, came) in found.items():
            assert refusal is not None, f"{name}: accepted"
            assert refusal.type == kind and refusal.message.startswith(f"{argument}: expected"), f"{name}: {refusal}"
            assert re.search(came, refusal.message), f"{name}: {refusal}"


# --- the fingerprint --------------------------------------------------------------------------------------------------


def test_fingerprints_differ_where_arrays_do() -> None:
    generator = torch.Generator().manual_seed(0)
    arrays = [
        torch.tensor(x)
        for x in ([1.0, 2.0], [2.0, 1.0], [-1.0, 2.0], [1.0, 4.0], [1.0], [1.0, 2.0, 0.0], [math.nan, 2.0])
    ]
    ids = torch.randint(150_000, (512,), generator=generator)
    for index in range(0, 512, 37):
        changed = ids.clone()
        changed[index] += 1
        arrays.append(changed)
    arrays += [ids, ids.flip(0), ids + 1, torch.zeros(512).long(), torch.ones(512).long()]
    assert len({fingerprint(x) for x in arrays}) == len(arrays)
    narrow = torch.randn(1000, generator=generator)
    assert len({fingerprint(torch.nextafter(narrow, torch.tensor(9.0)) if i else narrow) for i in range(2)}) == 2
    assert fingerprint(narrow) == fingerprint(narrow.double())
    assert fingerprint(torch.tensor([0.0])) == fingerprint(torch.tensor([-0.0]))
    mask = torch.tensor([True, False, True])
    masked = [fingerprint(torch.tensor([1.0, x, 3.0]), mask) for x in (2.0, math.nan, math.inf)]
    assert len(set(masked)) == 1
