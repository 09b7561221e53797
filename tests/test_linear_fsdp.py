"""A head that FSDP2 shards: two processes, gloo, on the CPU. The loss runs where FSDP has gathered the weight."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from modes import DEFAULT_MODE
from torch import Tensor, nn

from gspo_kernels import linear_gspo_loss, linear_token_logprobs

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.plain_memory,
    pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch with gloo"),
]

RANKS, LENGTHS, WIDTH, VOCAB = 2, [5, 3, 7, 2], 16, 53


class Policy(nn.Module):
    """A body and a head. The loss belongs into the forward: there the weight is whole, and outside it is a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, *rest: Tensor, **options: Any) -> Any:
        hidden = torch.tanh(self.body(x))
        return linear_gspo_loss(hidden, self.head.weight, *rest, bias=self.head.bias, **options)


def made() -> tuple[Policy, dict[str, Tensor]]:
    """The same in every process."""
    torch.manual_seed(0)
    policy, n = Policy(), sum(LENGTHS)
    with torch.no_grad():
        policy.head.weight.mul_(6)
    batch = {
        "x": torch.randn(n, WIDTH),
        "ids": torch.randint(VOCAB, (n,)),
        "old": torch.full((n,), -3.9),
        "advantages": torch.tensor([1.0, -0.5, 2.0, -1.5]),
    }
    return policy, batch


def share(batch: dict[str, Tensor], rank: int, ranks: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Of the sequences, those of one rank; the count is that of all ranks."""
    half = len(LENGTHS) // ranks
    chosen = range(rank * half, (rank + 1) * half)
    lengths = [LENGTHS[i] for i in chosen]
    start = sum(LENGTHS[: rank * half])
    rows = slice(start, start + sum(lengths))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    arrays = batch["x"][rows], batch["ids"][rows], batch["advantages"][list(chosen)], batch["old"][rows]
    wide = {"eps_low": 0.99, "eps_high": 99.0, "max_log_ratio": 10.0}
    return arrays, {"cu_seqlens": ends, "normalizer": len(LENGTHS), "chunk_bytes": 4 * VOCAB * 4, **wide}


def work(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=RANKS)
    policy, batch = made()
    fully_shard(policy)
    arrays, options = share(batch, rank, RANKS)
    loss, _ = policy(*arrays, **options)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    gradients: dict[str, Tensor] = {}
    for name, x in policy.named_parameters():
        assert isinstance(x.grad, DTensor) and x.grad.dtype == torch.float32
        gradients[name] = x.grad.full_tensor() * RANKS  # FSDP takes the mean over ranks, the normalizer counts all

    messages = []
    hidden, weight = torch.zeros(len(arrays[0]), WIDTH), policy.head.weight
    assert isinstance(weight, DTensor)  # resharded after the backward
    for refused in (
        lambda: linear_gspo_loss(hidden, weight, *arrays[1:], **options),
        lambda: linear_token_logprobs(hidden, weight, arrays[1]),
        lambda: linear_token_logprobs(hidden, weight.full_tensor(), arrays[1], bias=policy.head.bias),
    ):
        try:
            refused()
            messages.append("accepted")
        except TypeError as error:
            messages.append(str(error))
    if rank == 0:
        torch.save({"loss": loss, "gradients": gradients, "messages": messages}, f"{folder}/found")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # a child imports this file by name
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
        try:
            torch.multiprocessing.spawn(work, (folder,), nprocs=RANKS)
        finally:
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before
        loaded: dict[str, Any] = torch.load(f"{folder}/found")
    return loaded


def test_two_shards_are_one_process(found: dict[str, Any]) -> None:
    """Loss and gradients of head, bias and body: each rank has half of the sequences, and `normalizer` their count."""
    policy, batch = made()
    arrays, options = share(batch, 0, 1)
    loss, stats = policy(*arrays, **options)
    loss.backward()
    assert int(stats.head.recomputed_rows) > 0, "a sequence longer than a chunk is among them"
    assert float(found["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert set(found["gradients"]) == {"body.weight", "body.bias", "head.weight", "head.bias"}
    for name, x in policy.named_parameters():
        assert x.grad is not None and bool(x.grad.any())
        torch.testing.assert_close(found["gradients"][name], x.grad, rtol=1e-5, atol=1e-6 * float(x.grad.abs().max()))


def test_a_shard_is_refused_and_what_to_do_is_said(found: dict[str, Any]) -> None:
    """As if it were the whole head, half a vocabulary would give a loss that is wrong in silence."""
    for argument, message in zip(("weight", "weight", "bias"), found["messages"], strict=True):
        assert message.startswith(f"{argument}: expected a plain tensor; got a DTensor"), message
        assert "forward" in message and "full_tensor()" in message, message
