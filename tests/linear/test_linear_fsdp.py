"""A head that FSDP2 shards: two processes, gloo, on the CPU. The loss runs where FSDP has gathered the weight."""

from __future__ import annotations

from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from gspo_kernels import KeptTokens, linear_gspo_loss, linear_token_logprobs

pytestmark = ranks.mark

RANKS, LENGTHS, WIDTH, VOCAB = 2, [5, 3, 7, 2], 16, 53


class Policy(nn.Module):
    """A body and a head. The loss belongs into the forward: there the weight is whole, and outside it is a shard."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor, *rest: Tensor, **options: Any) -> Any:
        hidden = torch.tanh(self.body(x.to(self.body.weight.dtype)))
        if len(rest) == 1:  # token ids alone
            return linear_token_logprobs(hidden, self.head.weight, *rest, bias=self.head.bias)
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


def kept_share(rank: int, ranks: int) -> KeptTokens:
    """Each row keeps its token and two more, the first row of a sequence all."""
    _, batch = made()
    rows = [[int(t), (int(t) + 3) % VOCAB, (int(t) + 5) % VOCAB] for t in batch["ids"]]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    half = len(LENGTHS) // ranks
    first, last = ends[rank * half], ends[(rank + 1) * half]
    return KeptTokens.from_lists([None if t in ends else rows[t] for t in range(first, last)])


def work(rank: int) -> dict[str, Any]:
    policy, batch = made()
    fully_shard(policy)
    arrays, options = share(batch, rank, RANKS)
    found = [step(policy, arrays, {**options, **more}) for more in ({}, {"kept": kept_share(rank, RANKS)})]
    hidden, weight = torch.zeros(len(arrays[0]), WIDTH), policy.head.weight
    assert isinstance(weight, DTensor)  # resharded after the backward
    whole = weight.full_tensor()  # by all ranks, before one refuses
    refused = [
        ranks.refused(lambda: linear_gspo_loss(hidden, weight, *arrays[1:], **options)),
        ranks.refused(lambda: linear_token_logprobs(hidden, weight, arrays[1])),
        ranks.refused(lambda: linear_token_logprobs(hidden, whole, arrays[1], bias=policy.head.bias)),
    ]
    return {"steps": found, "refused": refused, "bf16": in_bf16(rank)}


def step(policy: Policy, arrays: tuple[Tensor, ...], options: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of all ranks, and the gradient of each parameter."""
    policy.zero_grad()
    loss, _ = policy(*arrays, **options)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    gradients: dict[str, Tensor] = {}
    for name, x in policy.named_parameters():
        assert isinstance(x.grad, DTensor) and x.grad.dtype == torch.float32
        gradients[name] = x.grad.full_tensor() * RANKS  # FSDP takes the mean over ranks, the normalizer counts all
    return loss, gradients


def in_bf16(rank: int) -> dict[str, Any]:
    """A step on-policy with parameters in bf16, by FSDP2's own policy and by that of docs/hidden-states.md."""

    def sharded(**options: Any) -> tuple[Policy, Any, dict[str, Any]]:
        policy, batch = made()
        fully_shard(policy, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, **options))
        (x, ids, advantages, _), given = share(batch, rank, RANKS)
        with torch.no_grad():
            old = policy(x, ids).logprobs
        return policy, (x, ids, advantages, old), given

    policy, arrays, options = sharded()
    refused = ranks.refused(lambda: policy(*arrays, **options))
    policy, arrays, options = sharded(cast_forward_inputs=False)
    loss, stats = policy(*arrays, **options)
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    policy, *_ = sharded(cast_forward_inputs=False, output_dtype=torch.bfloat16)
    rounded, _ = policy(*arrays, **options)
    return {
        "refused": refused, "loss": loss, "ratios": stats.log_ratio.exp(), "dtype": arrays[3].dtype,
        "rounded": rounded.dtype,
    }  # fmt: skip


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return ranks.run(RANKS, work)


@pytest.mark.parametrize("kept", [False, True], ids=["all columns", "kept columns"])
def test_two_shards_are_one_process(found: list[dict[str, Any]], kept: bool) -> None:
    """Loss and gradients of head, bias and body: each rank has half of the sequences, and `normalizer` their count."""
    policy, batch = made()
    arrays, options = share(batch, 0, 1)
    loss, stats = policy(*arrays, **options, kept=kept_share(0, 1) if kept else None)
    loss.backward()
    assert kept or int(stats.head.recomputed_rows) > 0, "a sequence longer than a chunk is among them"
    for of_rank in found:
        of_loss, gradients = of_rank["steps"][kept]
        assert float(of_loss) == pytest.approx(float(loss.detach()), rel=1e-6)
        assert set(gradients) == {"body.weight", "body.bias", "head.weight", "head.bias"}
        for name, x in policy.named_parameters():
            assert x.grad is not None and bool(x.grad.any())
            near = {"rtol": 1e-5, "atol": 1e-6 * float(x.grad.abs().max())}
            torch.testing.assert_close(gradients[name], x.grad, **near)


def test_a_shard_is_refused_and_what_to_do_is_said(found: list[dict[str, Any]]) -> None:
    """As if it were the whole head, half a vocabulary would give a loss that is wrong in silence."""
    for of_rank in found:
        for argument, refused in zip(("weight", "weight", "bias"), of_rank["refused"], strict=True):
            assert refused is not None and refused.type == "TypeError", refused
            assert refused.message.startswith(f"{argument}: expected a plain tensor; got a DTensor"), refused
            assert "forward" in refused.message and "full_tensor()" in refused.message, refused


def test_what_passes_through_the_module_keeps_its_digits(found: list[dict[str, Any]]) -> None:
    """FSDP2 casts it to bf16 unless told otherwise: ratios would be 0.998 to 1.002 where 1 is right."""
    _, batch = made()
    for of_rank in (each["bf16"] for each in found):
        refused = of_rank["refused"]
        assert refused is not None and refused.type == "TypeError", refused
        assert refused.message.startswith("old_logprobs: expected float32 or float64"), refused
        assert "MixedPrecisionPolicy(cast_forward_inputs=False)" in refused.message, refused
        torch.testing.assert_close(of_rank["ratios"], torch.ones_like(of_rank["ratios"]), rtol=0.0, atol=1e-6)
        assert of_rank["dtype"] == of_rank["loss"].dtype == torch.float32
        assert float(of_rank["loss"]) == pytest.approx(-float(batch["advantages"].mean()), rel=1e-6)
        assert of_rank["rounded"] == torch.bfloat16, "output_dtype rounds the loss"
