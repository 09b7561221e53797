"""The harness of the multi-process tests: what ranks return, how they fail, and that none of them stays."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

pytestmark = ranks.mark


def total(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    dist.all_reduce(values, group=group)
    return values


def number(rank: int) -> Tensor:
    return torch.tensor([float(rank)])


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


# --- what comes back --------------------------------------------------------------------------------------------------


@dataclass
class Found:
    rank: int
    world: int
    sum: Tensor
    tensors: dict[str, Tensor]


def finds(rank: int, offset: float, slow: int) -> Found:
    if rank == slow:
        time.sleep(0.3)
    weight = torch.nn.Parameter(number(rank) + offset)
    product = weight * 2
    product.sum().backward()
    assert weight.grad is not None
    everything = torch.arange(1000.0)
    tensors = {"weight": weight, "product": product, "grad": weight.grad, "view": everything[rank : rank + 2]}
    return Found(rank, dist.get_world_size(), total(number(rank) + offset), tensors)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_results_come_in_the_order_of_ranks(world: int) -> None:
    """And not of arrival: the first rank is the slowest. Of tensors, wherever they are, the values come."""
    found = ranks.run(world, finds, 0.5, 0)
    assert [x.rank for x in found] == list(range(world))
    for rank, x in enumerate(found):
        assert isinstance(x, Found) and x.world == world
        assert float(x.sum) == sum(range(world)) + 0.5 * world
        expected = {"weight": [rank + 0.5], "product": [2 * rank + 1.0], "grad": [2.0], "view": [rank, rank + 1.0]}
        assert {name: y.tolist() for name, y in x.tensors.items()} == expected
        assert not any(y.requires_grad for y in x.tensors.values())
        assert x.tensors["view"].untyped_storage().nbytes() == 8, "a view comes without what it is a view of"


def surroundings(rank: int) -> tuple[str | None, int, Tensor]:
    return os.environ.get("GSPO_RANKS_TEST"), torch.get_num_threads(), torch.empty(1000)


def test_a_rank_has_the_environment_of_the_call_one_thread_and_memory_of_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("one", "two"):
        monkeypatch.setenv("GSPO_RANKS_TEST", value)
        for there, count, memory in ranks.run(2, surroundings):
            assert there == value and count == 1
            assert bool(memory.isnan().all())
    monkeypatch.delenv("GSPO_RANKS_TEST")
    assert ranks.run(1, surroundings)[0][0] is None
    for _, _, memory in ranks.run(1, surroundings, plain_memory=True):
        assert not bool(memory.isnan().all())


def collectives(rank: int) -> dict[str, Tensor]:
    parts = [torch.empty(1) for _ in range(2)]
    dist.all_gather(parts, number(rank))
    broadcast = number(7) if rank == 0 else torch.empty(1)
    dist.broadcast(broadcast, 0)
    sent = torch.empty(1)
    for waiting in (dist.isend(number(rank), 1 - rank), dist.irecv(sent, 1 - rank)):
        assert waiting is not None
        waiting.wait()
    exchanged = torch.empty(2)
    dist.all_to_all_single(exchanged, torch.arange(2.0) + 10 * rank)
    largest = number(rank)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {
        "gathered": torch.cat(parts),
        "broadcast": broadcast,
        "sent": sent,
        "exchanged": exchanged,
        "largest": largest,
    }


def test_collectives_write_all_of_what_was_nan() -> None:
    for rank, found in enumerate(ranks.run(2, collectives)):
        assert {name: x.tolist() for name, x in found.items()} == {
            "gathered": [0, 1],
            "broadcast": [7],
            "sent": [1 - rank],
            "exchanged": [rank, 10 + rank],
            "largest": [1],
        }


# --- how ranks fail ---------------------------------------------------------------------------------------------------


def fails(rank: int, how: str, folder: str) -> None:
    """One rank does not come to the collective in which the others wait."""
    Path(folder, str(os.getpid())).touch()
    dist.barrier()
    if rank == 1:
        if how == "raises":
            raise ValueError("as rank 1 does")
        if how == "skips":
            pytest.skip("as rank 1 does")
        if how == "returns":
            return
        if how == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        if how == "hangs":
            time.sleep(3600)
    total(number(rank))


def failure(how: str, folder: Path, timeout: float) -> tuple[str, float]:
    began = time.monotonic()
    with pytest.raises(AssertionError) as raised:
        ranks.run(3, fails, how, str(folder), timeout=timeout)
    seconds = time.monotonic() - began
    processes = [int(path.name) for path in folder.iterdir()]
    assert len(processes) == 3 and not any(map(is_there, processes))
    message = str(raised.value)
    assert all(message.count(f"--- rank {rank}: ") == 1 for rank in range(3)), message
    return message, seconds


@pytest.mark.parametrize("how", ["raises", "skips"])
def test_an_exception_is_shown_and_ends_the_others(how: str, tmp_path: Path) -> None:
    """Before the timeout, for they lose a peer. That of the rank which raised comes first: it is the cause."""
    message, seconds = failure(how, tmp_path, timeout=600)
    assert seconds < 600
    first = message.split("--- rank ")[1]
    assert first.startswith("1: raised") and "in fails\n" in first and "as rank 1 does" in first, message
    assert message.startswith("test_ranks.fails: 3 of 3 ranks failed"), message
    assert message.count("in total\n") == 2, message  # where the others were


def test_a_collective_that_one_rank_leaves_out_is_given_up(tmp_path: Path) -> None:
    """The rank that has returned stays until then: that its peers fail is not because it has left."""
    message, seconds = failure("returns", tmp_path, timeout=5)
    assert seconds >= 5
    assert "2 of 3 ranks failed" in message and "--- rank 1: returned" in message and "imed out" in message, message


def test_the_death_of_a_rank_shows_its_stack(tmp_path: Path) -> None:
    message, seconds = failure("dies", tmp_path, timeout=600)
    assert seconds < 600
    dead = message.split("--- rank ")[-1]
    assert dead.startswith(f"1: no answer, exit code {-signal.SIGSEGV}") and " in fails\n" in dead, message


def test_a_rank_that_hangs_is_ended(tmp_path: Path) -> None:
    """Its peers give up at the timeout, it never would."""
    message, seconds = failure("hangs", tmp_path, timeout=5)
    assert seconds < 3600
    hung = message.split("--- rank ")[-1]
    assert hung.startswith("1: no answer") and "Timeout" in hung and " in fails\n" in hung, message


def unsendable(rank: int) -> Any:
    return (lambda: rank) if rank == 1 else rank


def test_a_result_that_cannot_be_sent_is_an_error_of_its_rank() -> None:
    with pytest.raises(AssertionError, match="1 of 2 ranks failed") as raised:
        ranks.run(2, unsendable)
    assert "pickle" in str(raised.value)


def refuses(rank: int) -> list[ranks.Refused | None]:
    def slow() -> None:
        time.sleep(0.05)
        raise TypeError(f"tp_group: as rank {rank} says")

    return [ranks.refused(slow), ranks.refused(lambda: total(number(rank)))]


def test_a_refusal_is_told_and_the_rank_goes_on() -> None:
    for rank, (refusal, accepted) in enumerate(ranks.run(2, refuses)):
        assert isinstance(refusal, ranks.Refused)
        assert (refusal.type, refusal.message) == ("TypeError", f"tp_group: as rank {rank} says")
        assert refusal.seconds >= 0.05
        assert accepted is None


# --- grids ------------------------------------------------------------------------------------------------------------


def in_grid(rank: int, tp: int, cp: int) -> list[Any]:
    groups = ranks.grid(rank, tp, cp)
    members = [dist.get_process_group_ranks(group) for group in groups]
    return [*members, *(float(total(number(rank), group)) for group in groups)]


@pytest.mark.parametrize(
    ("tp", "cp", "tp_groups", "cp_groups"),
    [
        (2, 2, [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]),
        (4, 1, [[0, 1, 2, 3]] * 4, [[0], [1], [2], [3]]),
        (1, 4, [[0], [1], [2], [3]], [[0, 1, 2, 3]] * 4),
    ],
)
def test_a_grid_of_four(tp: int, cp: int, tp_groups: list[list[int]], cp_groups: list[list[int]]) -> None:
    for rank, found in enumerate(ranks.run(4, in_grid, tp, cp)):
        assert found == [tp_groups[rank], cp_groups[rank], sum(tp_groups[rank]), sum(cp_groups[rank])]


def late_in_grid(rank: int) -> ranks.Refused | None:
    tp_group, _ = ranks.grid(rank, 2, 1)
    return ranks.refused(lambda: total(number(rank), tp_group)) if rank == 0 else None


def test_groups_of_a_grid_give_up_after_the_timeout_of_the_world() -> None:
    """And not after gloo's half an hour."""
    refusal, _ = ranks.run(2, late_in_grid, timeout=5)
    assert refusal is not None and "imed out" in refusal.message and 5 <= refusal.seconds < 1800
