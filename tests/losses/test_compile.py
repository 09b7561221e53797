"""torch.compile: one graph, the same numbers, nothing compiled anew when a batch or a schedule moves; the operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from batches import KINDS, LAYOUTS, PUBLIC, SHORT, arguments, flat, ragged_batch
from checks import check_close
from modes import BACKENDS, DEFAULT_MODE, INTERPRETED, by_backend, on_device, sized
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gspo_kernels import policy_loss, token_logprobs
from gspo_kernels.base.collectives import Ranks

pytestmark = pytest.mark.plain_memory  # inductor warns about, and slows down under, deterministic fills

# To inductor the operators are closed boxes, whatever kernels are in them; and it takes a minute.
inductor = pytest.mark.skipif(INTERPRETED, reason="compiles nothing of the Triton kernels: the default mode has it")
BATCHES = sized(20, 4)  # a recompilation shows at the third


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def value_and_gradient(function: Callable[..., Any], args: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
    leaf = args.logits.detach().clone().requires_grad_()
    loss, stats = function(leaf, *args.rest, **args.keywords, **options)
    (gradient,) = torch.autograd.grad(loss * 1.5, leaf)
    return loss.detach(), gradient, stats


def same(compiled: tuple[Tensor, Tensor, Any], eager: tuple[Tensor, Tensor, Any]) -> None:
    """Rows to the bit; sums may be taken in another order."""
    assert float(compiled[0]) == pytest.approx(float(eager[0]), rel=1e-6, abs=1e-7)
    check_close("gradient", compiled[1], eager[1], 1e-6 * eager[1].double().abs() + 2.0**-126)
    assert torch.equal(compiled[2].logprobs, eager[2].logprobs)
    for name, value in eager[2].as_dict("").items():
        assert float(compiled[2].as_dict("")[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-7), name


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "off-policy": ({}, {}),
    "on-policy": ({"on_policy": True, "groups": True}, {"aggregation": "group_mean"}),
    "kept": ({"kept": True, "temperature": "token"}, {"entropy_coef": 0.01}),
    "all": (
        {"ref": True, "rollout": True, "weights": "token", "temperature": "token", "softcap": 6.0},
        {"beta": 0.1, "kl_weighting": "ratio", "entropy_coef": 0.01, "dual_clip": 3.0},
    ),
}


@pytest.mark.parametrize(
    ("objective", "layout", "case"),
    [("gspo", layout, case) for layout in LAYOUTS for case in CASES]
    + [(objective, "packed", "all") for objective in KINDS[1:]],  # all: --all
)
def test_one_graph_with_the_same_numbers(objective: str, layout: str, case: str) -> None:
    """Traced and differentiated by aot_eager, which is what every backend of torch.compile starts from."""
    build, options = CASES[case]
    args = arguments(ragged_batch(objective, seed=30, lengths=SHORT, **build), layout)
    compiled = torch.compile(PUBLIC[objective], fullgraph=True, backend="aot_eager")
    same(value_and_gradient(compiled, args, **options), value_and_gradient(PUBLIC[objective], args, **options))


@inductor
@pytest.mark.parametrize(
    ("layout", "case"), [pytest.param("padded", "off-policy", marks=pytest.mark.only_with_all), ("packed", "all")]
)
def test_inductor(layout: str, case: str) -> None:
    build, options = CASES[case]
    args = arguments(ragged_batch("gspo", seed=31, **build), layout)
    compiled = torch.compile(PUBLIC["gspo"], fullgraph=True)
    same(value_and_gradient(compiled, args, **options), value_and_gradient(PUBLIC["gspo"], args, **options))


@inductor
@by_backend
def test_masked_rows_under_inductor(backend: str) -> None:
    """Rows that a kernel returns from without writing have been silently wrong in others once compiled."""
    args = arguments(ragged_batch("grpo", seed=32, dtype=torch.bfloat16), "padded")

    def work(logits: Tensor) -> Tensor:
        out = token_logprobs(logits, args.rest[0], mask=args.keywords["mask"], backend=backend)
        return (out.logprobs * 2 - out.entropy).sum()

    leaves = [args.logits.detach().clone().requires_grad_() for _ in range(2)]
    eager, compiled = work(leaves[0]), torch.compile(work, fullgraph=True)(leaves[1])
    eager.backward()
    compiled.backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert float(compiled.detach()) == pytest.approx(float(eager.detach()), rel=1e-6)
    assert torch.equal(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overwriting_under_compile(layout: str) -> None:
    """As a training step compiles it: the logits are made inside, and given away."""
    batch = ragged_batch("gspo", seed=33)
    args = arguments(batch, layout)

    def work(x: Tensor, overwrite: bool) -> Tensor:
        loss: Tensor = PUBLIC["gspo"](x * 1, *args.rest, **args.keywords, overwrite_logits=overwrite)[0]
        return loss

    gradients = []
    for function, overwrite in ((work, False), (torch.compile(work, fullgraph=True, backend="aot_eager"), True)):
        leaf = args.logits.detach().clone().requires_grad_()
        function(leaf, overwrite).backward()
        assert leaf.grad is not None
        gradients.append(flat(leaf.grad, batch, layout))
    check_close("gradient", gradients[1], gradients[0], 1e-6 * gradients[0].abs())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compilations_do_not_grow_with_lengths(layout: str) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(PUBLIC["gspo"], fullgraph=True, backend=counter)
    for k in range(BATCHES):
        lengths = sized([3 + k, 2, 5, 4 + k % 3], [1 + k, 2, 1, k % 3])
        args = arguments(ragged_batch("gspo", seed=k, lengths=lengths), layout)
        same(value_and_gradient(compiled, args), value_and_gradient(PUBLIC["gspo"], args))
    assert counter.frame_count <= 2, "once as it came, once with a symbolic length"


def test_compilations_do_not_grow_with_annealed_numbers() -> None:
    """All at once: a number that is compiled as it is would take a compilation for each of its values."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(PUBLIC["gspo"], fullgraph=True, backend=counter)
    args = arguments(ragged_batch("gspo", seed=34, ref=True, lengths=SHORT), "packed")
    args.keywords.pop("temperature")
    for k in range(BATCHES):
        numbers = {
            "temperature": 0.5 + 0.05 * k,
            "softcap": 10.0 + k,
            "logit_scale": 0.4 + 0.05 * k,
            "eps_high": 1e-4 * (k + 1),
            "eps_low": 2e-4 * (k + 1),
            "beta": 0.01 * (k + 1),
            "entropy_coef": 0.02 * (k + 1),
            "max_log_ratio": 5.0 + k,
            "normalizer": 10.0 + k / 2,
        }
        same(value_and_gradient(compiled, args, **numbers), value_and_gradient(PUBLIC["gspo"], args, **numbers))
    assert counter.frame_count <= 3, f"{counter.frame_count} compilations for {BATCHES} values of each number"


def test_errors_come_through() -> None:
    args = arguments(ragged_batch("gspo", seed=35), "packed")
    compiled = torch.compile(PUBLIC["gspo"], backend="aot_eager")
    with pytest.raises(ValueError, match="aggregation"):
        compiled(args.logits, *args.rest, **args.keywords, aggregation="mean")


# --- operators --------------------------------------------------------------------------------------------------------


def samples(name: str, group: dist.ProcessGroup | None) -> list[dict[str, Any]]:
    """Arguments for an operator of the package, by name. A temperature for all rows is on the CPU in every mode."""
    generator = torch.Generator().manual_seed(0)
    logits = on_device(torch.randn(2, 3, 17, generator=generator))
    one = torch.ones((), dtype=torch.float64)
    hot = on_device(torch.rand(2, 3, generator=generator) + 0.5)
    given: dict[str, Any] = {  # what an operator does not name is left out
        "logits": logits,
        "token_ids": on_device(torch.randint(15, (2, 3), generator=generator)),
        "mask": on_device(torch.tensor([[True, True, False], [True, True, True]])),
        "temperature": hot,
        "vocab_size": 17,
        "overwrite_logits": False,
        "backend": BACKENDS[0],
        "logprobs": torch.zeros_like(hot),
        "entropy": torch.zeros_like(hot),
        "lse": logits.logsumexp(-1).double(),
        **dict.fromkeys(["grad_logprobs", "grad_entropy", "grad_lse"], torch.ones_like(hot)),
        **dict.fromkeys(["upstream_logprobs", "upstream_entropy", "upstream_lse"], torch.ones_like(hot)),
        **dict.fromkeys(["row_indices", "tanh_scale", "tickets", "kept_ids", "kept_offsets", "kept_form"]),
        "factor": on_device(torch.tensor(0.5)),
        "counts": on_device(torch.tensor([2, 3])),
        "gradient": torch.zeros_like(logits),
        "cu_seqlens": on_device(torch.tensor([0, 2, 2, 6])),
        "boundaries": on_device(torch.tensor([0, 2, 2, 6])),
        "sequence_of": on_device(torch.tensor([0, 0, 2, 2, 2, 2])),
        "fault": on_device(torch.zeros((), dtype=torch.float64)),
        "tokens": 6,
        **dict.fromkeys(["advantages", "old_logprobs", "ref_logprobs", "importance_weights"], hot - 1.0),
        "global_count": on_device(torch.tensor(4.0)),
        "numbers": torch.tensor([3e-4, 4e-4, 3.0, 20.0, 0.1, 0.01, 0.0], dtype=torch.float64),  # on the CPU too
        "aggregation": "sequence_mean",
        "kl_estimator": "k3",
        **dict.fromkeys(["advantages_per_token", "weights_per_token", "entropy_bonus"], True),
        "begin": 0,
        **Ranks("tp_group", 1, 0, "" if group is None else group.group_name)._asdict(),
        "width": 17,
        "shard_vocab_size": 17,
        "crosses": True,
    }
    by_token = on_device(torch.randn(6, generator=generator)).double()
    none = dict.fromkeys(["mask", "factor", "counts", "grad_entropy", "grad_lse", "upstream_entropy", "upstream_lse"])
    no_entropy = dict.fromkeys(["entropy", "lse"])
    kept = {
        "kept_ids": on_device(torch.tensor([3, 9, 0, 16, 4, 12, 1, 2], dtype=torch.int32)),
        "kept_offsets": on_device(torch.tensor([0, 2, 2, 3, 5, 7, 8])),
        "kept_form": "some",
        "token_ids": on_device(torch.tensor([[9, 5, 0], [16, 12, 2]])),
    }
    ones = torch.ones_like(hot)
    of_both = {
        **{f"full_{name}": given[name] for name in ("logprobs", "entropy", "lse")},
        **{f"{of}_upstream_{name}": ones for of in ("kept", "full") for name in ("logprobs", "entropy", "lse")},
        **dict.fromkeys([*(f"full_upstream_{name}" for name in ("factor", "counts", "tickets")), "factor", "counts"]),
    }
    changes: dict[str, list[dict[str, Any]]] = {
        "row_stats": [
            {"logits": logits.clone().requires_grad_(), "temperature": one, "mask": None},
            {"logits": logits.clone().requires_grad_(), "backend": BACKENDS[-1], "vocab_size": 15},
            {"logits": logits.clone().requires_grad_(), "tanh_scale": one * 0.3, "backend": BACKENDS[-1]},
            {"logits": logits.bfloat16(), "temperature": one * 0.7, "backend": BACKENDS[0]},
            {"logits": logits.clone().requires_grad_(), **kept},
        ],
        "row_stats_of_both": [{"logits": logits.clone().requires_grad_(), **kept}],
        "row_gradient_of_both_": [{**kept, **of_both}],
        "row_gradient_": [{}, kept, {**none, "temperature": one * 0.7, "backend": BACKENDS[-1], "vocab_size": 15}],
        "row_stats_and_gradient_": [
            {"logprobs": hot, **no_entropy},
            {**none, **no_entropy, "logprobs": hot, "temperature": one, "vocab_size": 15},
        ],
        "scale_": [{"values": logits.clone(), "factor": on_device(torch.tensor(0.5))}],
        "sharded_row_stats": [
            {"logits": logits.clone().requires_grad_()},
            {
                "logits": logits.clone().requires_grad_(),
                "mask": None,
                "temperature": one,
                "vocab_size": 15,
                "shard_vocab_size": 15,
            },
        ],
        "gae": [
            {"rewards": hot, "values": hot, "rewards_per_token": True, "cu_seqlens": None, "last_values": None},
            {
                "rewards": hot[:, :2].reshape(-1)[:3],
                "values": hot.view(-1),
                "rewards_per_token": False,
                "mask": given["mask"].view(-1),
                "last_values": hot.view(-1)[:3].double(),
            },
        ],
        "gather": [{"values": by_token.detach()}],
        "sum_over_ranks": [{"values": by_token.clone().requires_grad_()}],
        "segments": [{}, {"cu_seqlens": given["cu_seqlens"].int()}],
        "segment_sum": [{"values": by_token.requires_grad_()}],
        "segment_spread": [{"values": by_token[:3].detach().requires_grad_()}],
    }
    return [{**given, **change} for change in changes[name]]


def operators() -> list[str]:
    """Of rows; the others are in test_fused_operators.py and in tests/linear/test_linear_operators.py."""
    names = torch._C._dispatch_get_all_op_names()
    found = [name.removeprefix("gspo_kernels::") for name in names if name.startswith("gspo_kernels::")]
    elsewhere = ("linear_", "fused_", "test_")
    return sorted(name for name in found if not name.startswith(elsewhere))


@pytest.mark.parametrize("name", operators())
def test_operators_keep_their_contract(name: str, group_of_one: dist.ProcessGroup | None) -> None:
    """Schema (nothing aliased or mutated unsaid), fake tensors, autograd, and dynamic shapes under AOT dispatch."""
    if name in ("gather", "sum_over_ranks", "sharded_row_stats") and group_of_one is None:
        pytest.skip("needs torch with gloo, or with NCCL on a GPU")
    operator = getattr(torch.ops.gspo_kernels, name).default
    tests = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    for given in samples(name, group_of_one):
        arguments = tuple(given[argument.name] for argument in operator._schema.arguments)
        torch.library.opcheck(operator, arguments, test_utils=tests)


def test_policy_loss_compiles_with_an_objective_made_outside() -> None:
    from gspo_kernels import GSPO

    args = arguments(ragged_batch("gspo", seed=36), "padded")
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    objective = GSPO(1e-3, 2e-3)
    same(
        value_and_gradient(compiled, args, objective=objective),
        value_and_gradient(policy_loss, args, objective=objective),
    )


@DEFAULT_MODE
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_losses_compile(layout: str, group_of_one: dist.ProcessGroup | None) -> None:
    """One graph with its collectives in it; groups of one have them all."""
    if group_of_one is None:
        pytest.skip("needs torch with gloo")
    args = arguments(ragged_batch("gspo", seed=37), layout)
    compiled = torch.compile(policy_loss, fullgraph=True, backend="aot_eager")
    for groups in ({"tp_group": group_of_one}, {"cp_group": group_of_one}):
        same(value_and_gradient(compiled, args, **groups), value_and_gradient(policy_loss, args, **groups))
