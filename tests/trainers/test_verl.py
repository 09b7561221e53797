"""The losses gspo_kernels and gspo_token_kernels as verl's trainers call them, against the oracle and verl's `gspo`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from batches import Batch, edge_batch, ragged_batch, to_padded
from checks import check_close, check_number
from modes import DEFAULT_MODE
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from gspo_kernels.integrations import verl as integration

pytestmark = DEFAULT_MODE


def loss_of(name: str) -> Callable[..., Any]:
    """The loss by its name in verl's registry."""
    assert integration.LOSSES
    return get_policy_loss_fn(name)  # type: ignore[no-any-return]


def config(**changes: Any) -> Any:
    fields = {"clip_ratio": 0.2, "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4, "clip_ratio_c": 3.0}
    fields |= {"global_batch_info": {}} | changes
    return ActorConfig(strategy="fsdp", rollout_n=8, ppo_micro_batch_size_per_gpu=8, **fields)


# --- batches as verl has them: token arrays [B, T] --------------------------------------------------------------------

LOSSES = {"gspo_kernels": "gspo", "gspo_token_kernels": "gspo_token"}
MODES = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
GLOBAL = {"dp_size": 4, "batch_num_tokens": 96, "global_batch_size": 40, "loss_scale_factor": None}


def arguments(batch: Batch, *, dtype: torch.dtype = torch.float64, clean: bool = False) -> dict[str, Any]:
    """By keyword, as verl's `ppo_loss` passes them; `clean`: with zeros where the mask is False."""
    spread = torch.tensor(batch.lengths)
    fill = 0.0 if clean else math.nan

    def lay(values: Tensor, by_token: bool = True) -> Tensor:
        found = values.to(dtype) if by_token else values.to(dtype).repeat_interleave(spread)
        if clean:
            found = found.masked_fill(~batch.mask, 0.0)
        return to_padded(found, batch.lengths, fill)

    assert batch.old_logprobs is not None
    logprobs = torch.tensor([row.logprob for row in batch.rows], dtype=dtype).masked_fill(~batch.mask, fill)
    return {
        "old_log_prob": lay(batch.old_logprobs),
        "log_prob": lay(logprobs).requires_grad_(),
        "advantages": lay(batch.advantages, batch.by_token),
        "response_mask": to_padded(batch.mask, batch.lengths, False),
        "rollout_is_weights": None if batch.weights is None else lay(batch.weights, batch.weights_by_token),
    }


def call(name: str, given: dict[str, Any], **more: Any) -> tuple[Tensor, Tensor, dict[str, float]]:
    """(loss, its gradient by log_prob, metrics)."""
    given = given | {"log_prob": given["log_prob"].detach().clone().requires_grad_()}
    loss, metrics = loss_of(name)(**given, **{"loss_agg_mode": "seq-mean-token-mean", "config": config(), **more})
    loss.backward()
    return loss.detach(), given["log_prob"].grad, metrics


def options_of(mode: str, info: dict[str, Any], batch: Batch) -> dict[str, Any]:
    """The oracle's options for verl's divisor; gradients are averaged over dp_size ranks afterwards."""
    kept = [sum(bool(batch.mask[t]) for t in rows) for rows in batch.sequences]
    tokens, sequences = info.get("batch_num_tokens", sum(kept)), info.get("global_batch_size", sum(map(bool, kept)))
    factor = info.get("loss_scale_factor") or max(batch.lengths) + 1
    counts = {"token-mean": tokens, "token-sum": 1, "seq-mean-token-sum-norm": sequences * factor}
    over_tokens = "token_mean" if mode.startswith("token") else "sequence_sum"
    return {
        "aggregation": "sequence_mean" if mode == "seq-mean-token-mean" else over_tokens,
        "normalizer": counts.get(mode, sequences) / info.get("dp_size", 1),
    }


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "sequence", "token"])
@pytest.mark.parametrize("info", [{}, GLOBAL, GLOBAL | {"loss_scale_factor": 7}], ids=["local", "global", "factor"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_every_aggregation_against_the_oracle(name: str, mode: str, info: Any, weights: str | None) -> None:
    """Value and gradient in float64, with NaN in the padding, and the metrics."""
    objective = LOSSES[name]
    batch = ragged_batch(objective, weights=weights, by_token=objective == "gspo_token", seed=8)  # all bounds are met
    given = arguments(batch)
    loss, gradient, metrics = call(name, given, loss_agg_mode=mode, config=config(global_batch_info=dict(info)))
    expected = batch.expected(objective, dual_clip=3.0, **options_of(mode, info, batch))
    check_number("loss", float(loss), expected.loss, 1e-12 * expected.loss_size)
    reference = to_padded(torch.tensor(expected.d_logprobs, dtype=torch.float64), batch.lengths, 0.0)
    size = to_padded(torch.tensor(expected.d_logprobs_size, dtype=torch.float64), batch.lengths, 0.0)
    check_close("gradient", gradient, reference, 1e-12 * size)
    check_metrics(metrics, batch, expected, objective)


def check_metrics(metrics: dict[str, float], batch: Batch, expected: oracle.Result, objective: str) -> None:
    assert all(type(x) is float and math.isfinite(x) for x in metrics.values()), metrics
    advantages = batch.spread(batch.advantages, batch.by_token)
    assert batch.old_logprobs is not None
    clipped, held, kl, count = 0, 0, 0.0, 0
    for i, rows in enumerate(batch.sequences):
        for j, t in enumerate(rows):
            if not batch.mask[t]:
                continue
            ratio = math.exp(expected.log_ratio[i]) if objective == "gspo" else sequence_ratio(batch, rows)
            clipped += advantages[i][j] > 0 and ratio > 1 + 4e-4
            clipped += advantages[i][j] < 0 and ratio < 1 - 3e-4
            held += advantages[i][j] < 0 and ratio > 3
            kl += float(batch.old_logprobs[t]) - batch.rows[t].logprob
            count += 1
    assert clipped and held, "both bounds and the dual clip are there to be counted"
    check_number("pg_clipfrac", metrics["actor/pg_clipfrac"], clipped / count, 1e-6)
    check_number("pg_clipfrac_lower", metrics["actor/pg_clipfrac_lower"], held / count, 1e-6)
    check_number("ppo_kl", metrics["actor/ppo_kl"], kl / count, 1e-9)
    ours = {name.removeprefix("actor/gspo_kernels/"): x for name, x in metrics.items() if "gspo_kernels/" in name}
    assert set(ours) == set(expected.stats) - {"entropy", "ref_kl"}
    for name, x in ours.items():
        check_number(name, x, expected.stats[name], 1e-5 * abs(expected.stats[name]) + 1e-12)


def sequence_ratio(batch: Batch, rows: range) -> float:
    assert batch.old_logprobs is not None
    kept = [batch.rows[t].logprob - float(batch.old_logprobs[t]) for t in rows if batch.mask[t]]
    return math.exp(sum(kept) / len(kept))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_shares_of_ranks_and_micro_batches_are_the_whole(name: str, mode: str) -> None:
    """verl sums over micro-batches and averages over ranks: the result equals one process (verl #5798)."""
    objective = LOSSES[name]
    batch = ragged_batch(objective)
    whole = arguments(batch)
    mask = whole["response_mask"]
    info = {"batch_num_tokens": int(mask.sum()), "global_batch_size": int(mask.any(1).sum()), "loss_scale_factor": 9}
    loss, gradient, _ = call(name, whole, loss_agg_mode=mode, config=config(global_batch_info=info | {"dp_size": 1}))
    of_ranks = torch.tensor_split(torch.arange(len(mask)), 2)
    shares, gradients = [], []
    for rows in of_ranks:
        for micro in torch.tensor_split(rows, 3):
            part = {k: x if x is None else x[micro] for k, x in whole.items()}
            at = config(global_batch_info=info | {"dp_size": 2})
            share, g, _ = call(name, part, loss_agg_mode=mode, config=at)
            shares.append(share / 2)
            gradients.append(g / 2)
    check_number("loss", float(sum(shares)), float(loss), 1e-12 * float(torch.stack(shares).abs().sum()))
    check_close("gradient", torch.cat(gradients), gradient, 1e-12 * gradient.abs())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_a_batch_in_which_nothing_counts(name: str, mode: str) -> None:
    """verl rejects whole responses by their mask; its local mean is then 0 / 0."""
    given = arguments(ragged_batch(LOSSES[name])) | {"response_mask": torch.zeros(13, 8, dtype=torch.bool)}
    for info in ({}, {"dp_size": 2, "batch_num_tokens": 0, "global_batch_size": 0}):
        loss, gradient, metrics = call(name, given, loss_agg_mode=mode, config=config(global_batch_info=info))
        assert float(loss) == 0 and bool((gradient == 0).all())
        assert all(x == 0 for x in metrics.values()), metrics


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("side", ["low", "high"])
def test_the_edge_of_the_clip_range(name: str, side: str) -> None:
    """Ratios 3e-8 from the edge, float32 log-probabilities: decisions equal the oracle's."""
    batch = edge_batch(LOSSES[name], side)
    given = arguments(batch, dtype=torch.float32)
    kept = given["response_mask"]
    logprobs = given["log_prob"].detach().double()[kept].tolist()
    active = torch.tensor([g != 0 for g in batch.expected(LOSSES[name], logprobs=logprobs).d_logprobs])
    assert torch.equal(call(name, given)[1][kept] != 0, active)


def test_clip_ratio_stands_in_for_what_is_none() -> None:
    given = arguments(ragged_batch("gspo"))
    one = config(clip_ratio=5e-4, clip_ratio_low=None, clip_ratio_high=None)
    both = config(clip_ratio_low=5e-4, clip_ratio_high=5e-4)
    assert torch.equal(call("gspo_kernels", given, config=one)[1], call("gspo_kernels", given, config=both)[1])
    other = config(clip_ratio_low=5e-4, clip_ratio_high=5e-4, clip_ratio_c=None)
    assert not torch.equal(call("gspo_kernels", given, config=one)[1], call("gspo_kernels", given, config=other)[1])


def test_refusals_name_the_option() -> None:
    given = arguments(ragged_batch("gspo"))
    with pytest.raises(ValueError, match=r"loss_agg_mode: expected one of 'token-mean'.*got 'seq-mean'"):
        call("gspo_kernels", given, loss_agg_mode="seq-mean")
    for mode, count in (("token-mean", "batch_num_tokens"), ("seq-mean-token-mean", "global_batch_size")):
        with pytest.raises(ValueError, match=rf"{count}: .*dp_size is 2; got None"):
            call("gspo_kernels", given, loss_agg_mode=mode, config=config(global_batch_info={"dp_size": 2}))
    with pytest.raises(ValueError, match=r"config: expected verl's ActorConfig"):
        call("gspo_kernels", given, config=None)
    with pytest.raises(TypeError, match=r"^log_prob: expected float32 or float64.*bfloat16"):
        call("gspo_kernels", given | {"log_prob": given["log_prob"].bfloat16()})
    for name in ("gspo_kernels", "gspo_token_kernels"):
        with pytest.raises(TypeError, match=r"advantages: expected .* an integer dtype; got torch.bool"):
            call(name, given | {"advantages": given["advantages"] > 0})
    by_token = arguments(ragged_batch("gspo_token", by_token=True))
    with pytest.raises(ValueError, match=r"advantages: .*responses with several.*loss_mode=gspo_token_kernels"):
        call("gspo_kernels", by_token)


TOKEN_ARRAYS = ["log_prob", "old_log_prob", "advantages", "response_mask", "rollout_is_weights"]


@pytest.mark.parametrize("array", TOKEN_ARRAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_token_arrays_are_refused_by_verls_names(name: str, array: str) -> None:
    """Nothing is broadcast: [B], [B, 1], [1, T] and [B, T + 1] are refused."""
    given = arguments(ragged_batch(LOSSES[name], weights="token"), clean=True)
    right = given[array].detach()
    wider = torch.cat((right, right[:, :1]), 1)
    wrong = [right.tolist(), right[:, 0], right[:, :1], right[:1], wider, right[..., None], right.to(torch.complex64)]
    for value in wrong if array == "rollout_is_weights" else [None, *wrong]:
        with pytest.raises((TypeError, ValueError)) as error:
            loss_of(name)(**given | {array: value, "loss_agg_mode": "token-mean", "config": config()})
        names = [array, "old_log_prob"] if array == "log_prob" else [array]  # log_prob's [B, T] is that of the others
        assert any(str(error.value).startswith(f"{x}: expected ") for x in names), error.value


def test_log_probabilities_are_refused_by_verls_names() -> None:
    given = arguments(ragged_batch("gspo"), clean=True)
    for array in ("log_prob", "old_log_prob"):
        with pytest.raises(ValueError, match=f"^{array}: expected log-probabilities, at most 0"):
            call("gspo_kernels", given | {array: given[array].detach().exp()})


@pytest.mark.parametrize("shape", [(3, 0), (0, 4)])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_tokens_at_all(name: str, mode: str, shape: tuple[int, int]) -> None:
    given = {array: torch.zeros(shape) for array in TOKEN_ARRAYS} | {"response_mask": torch.zeros(shape).bool()}
    for info in ({}, GLOBAL):
        loss, gradient, metrics = call(name, given, loss_agg_mode=mode, config=config(global_batch_info=dict(info)))
        assert float(loss) == 0 and gradient.shape == shape and all(math.isfinite(x) for x in metrics.values())


@pytest.mark.parametrize("count", [0, 0.0, -1, math.nan, torch.tensor(0), torch.ones(1)], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_global_count_of_nothing_where_tokens_count(mode: str, count: Any) -> None:
    info = {"dp_size": 2, "batch_num_tokens": count, "global_batch_size": count}
    given = arguments(ragged_batch("gspo"))
    if mode == "token-sum":  # divides by no count
        call("gspo_kernels", given, loss_agg_mode=mode, config=config(global_batch_info=info))
        return
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call("gspo_kernels", given, loss_agg_mode=mode, config=config(global_batch_info=info))


@pytest.mark.parametrize(("name", "value"), [("dp_size", 0), ("loss_scale_factor", 0)])
def test_other_divisors_of_nothing(name: str, value: int) -> None:
    at = config(global_batch_info=GLOBAL | {name: value})
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        call("gspo_kernels", arguments(ragged_batch("gspo")), loss_agg_mode=MODES[-1], config=at)


# --- against verl -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "sequence", "token"])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_verls_gspo(name: str, dtype: torch.dtype, mode: str, info: Any, weights: str | None) -> None:
    """Without a dual clip, because verl's GSPO ignores clip_ratio_c, and with zeros in the padding."""
    by_token = name == "gspo_token_kernels"
    if weights == "token" and not by_token:
        weights = "sequence"  # see test_weights_per_token_in_gspo
    batch = ragged_batch(LOSSES[name], weights=weights, by_token=by_token)
    given = arguments(batch, dtype=dtype, clean=True)
    more = {"loss_agg_mode": mode, "config": config(clip_ratio_c=None, global_batch_info=dict(info))}
    loss, gradient, metrics = call(name, given, **more)
    theirs, their_gradient, their_metrics = call("gspo", given, **more)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    size = batch.expected(LOSSES[name], **options_of(mode, info, batch)).loss_size
    check_number("loss", float(loss), float(theirs), tolerance * size)
    check_close("gradient", gradient, their_gradient, tolerance * their_gradient.abs())
    assert float(their_gradient.abs().max()) > 0
    assert set(their_metrics) <= set(metrics)
    for key, x in their_metrics.items():
        check_number(key, metrics[key], x, 1e-6 * (1 + abs(x)))


def test_clip_ratio_c_of_verl_is_never_read() -> None:
    """verl's scripts set clip_ratio_c for GSPO ("dual-clip guard"), but its loss ignores it. Ours honours it."""
    given = arguments(ragged_batch("gspo"), clean=True)
    theirs = [call("gspo", given, config=config(clip_ratio_c=c))[0] for c in (1.5, 10.0)]
    assert torch.equal(*theirs)
    ours = [call("gspo_kernels", given, config=config(clip_ratio_c=c))[0] for c in (1.5, 10.0)]
    assert ours[0] < ours[1]


def test_garbage_in_the_padding() -> None:
    """One NaN in old_log_prob where the mask is False: verl's loss is NaN in every mode with a mean."""
    batch = ragged_batch("gspo")
    given = arguments(batch, clean=True)
    outside = torch.nonzero(~given["response_mask"] & given["response_mask"].any(1, keepdim=True))[0]
    given["old_log_prob"][tuple(outside)] = math.nan
    assert math.isnan(call("gspo", given)[0])
    loss, gradient, metrics = call("gspo_kernels", given)
    assert all(map(math.isfinite, [loss, *metrics.values()])) and bool(gradient.isfinite().all())


def test_a_stale_response() -> None:
    """Log-ratio 11, A < 0: verl's clamp at 10 leaves no gradient. Ours has the paper's, up to clip_ratio_c."""
    batch = ragged_batch("gspo")
    given = arguments(batch, clean=True)
    i = next(i for i in range(13) if given["advantages"][i].min() < 0)
    given["old_log_prob"][i] = given["log_prob"][i].detach() - 11
    none = config(clip_ratio_c=None)
    assert bool((call("gspo", given, config=none)[1][i] == 0).all())
    kept = given["response_mask"][i]
    reference = -given["advantages"][i] * math.exp(11) / (kept.sum() * given["response_mask"].any(1).sum())
    check_close("gradient", call("gspo_kernels", given, config=none)[1][i], reference, 1e-9 * reference.abs())
    assert bool((call("gspo_kernels", given)[1][i] == 0).all()), "held at clip_ratio_c"


def test_weights_per_token_in_gspo() -> None:
    """GSPO's ratio is the response's, so its tokens' weights are averaged. verl weights each token's gradient."""
    given = arguments(ragged_batch("gspo", weights="token"), clean=True)
    none = {"config": config(clip_ratio_c=None)}
    ours, theirs = call("gspo_kernels", given, **none), call("gspo", given, **none)
    check_number("loss", float(ours[0]), float(theirs[0]), 1e-7 * abs(float(theirs[0])))
    total = theirs[1].sum(1)
    check_close("a response's gradient", ours[1].sum(1), total, 1e-7 * theirs[1].abs().sum(1))
    assert not torch.allclose(ours[1], theirs[1])
    same = call("gspo_token_kernels", given, **none)
    check_close("gradient", same[1], theirs[1], 1e-7 * theirs[1].abs())


def test_rejected_responses_count_where_verl_counts_them() -> None:
    """A response without unmasked tokens is not in verl's local count, but in global_batch_size."""
    given = arguments(ragged_batch("gspo"), clean=True)
    given["response_mask"][0, 0] = False  # masked first, and a response all the same
    responses = len(given["response_mask"])
    empty = responses - int(given["response_mask"].any(1).sum())
    assert empty == 2
    for info, count in (({}, responses - empty), ({"global_batch_size": responses}, responses)):
        at = {"config": config(clip_ratio_c=None, global_batch_info=info)}
        ours, theirs = call("gspo_kernels", given, **at)[0], call("gspo", given, **at)[0]
        check_number("loss", float(ours), float(theirs), 1e-7 * abs(float(theirs)))
        whole = call("gspo_kernels", given, loss_agg_mode="seq-mean-token-mean", config=config(clip_ratio_c=None))[0]
        check_number("count", float(ours) * count, float(whole) * (responses - empty), 1e-9)


# --- through verl's `ppo_loss` ----------------------------------------------------------------------------------------


def model_batch(batch: Batch, prompt: int = 3) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(what verl's trainer passes, the padded arguments, nested token arrays of the model)."""
    from tensordict import NonTensorData, TensorDict

    given = arguments(batch, dtype=torch.float32, clean=True)
    rows, width = given["response_mask"].shape
    lengths = [length + prompt for length in batch.lengths]
    attention = torch.zeros(rows, prompt + width, dtype=torch.int64)
    for i, length in enumerate(batch.lengths):
        attention[i, : prompt + length] = 1

    def nested(values: Tensor) -> Tensor:
        """Of a model: row t predicts token t + 1, so a response's first value stands at its prompt's last token."""
        parts = []
        for i, length in enumerate(lengths):
            of_tokens = values.new_zeros(length)
            of_tokens[prompt - 1 : length - 1] = values[i, : batch.lengths[i]]
            parts.append(of_tokens)
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), torch.tensor([0, *lengths]).cumsum(0))

    data = TensorDict(
        {
            "prompts": torch.zeros(rows, prompt, dtype=torch.int64),
            "responses": torch.zeros(rows, width, dtype=torch.int64),
            "attention_mask": attention,
            "response_mask": given["response_mask"].long(),
            "old_log_probs": given["old_log_prob"],
            "advantages": given["advantages"],
            "ref_log_prob": given["old_log_prob"] + 0.3,
            **({} if batch.weights is None else {"rollout_is_weights": given["rollout_is_weights"]}),
        },
        batch_size=[rows],
    )
    info = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 30}
    for key, value in info.items():
        data[key] = NonTensorData(value)
    return data, given, {"nested": nested}


KL_KINDS = dict(zip(MODES, ("kl", "abs", "mse", "low_var_kl", "k3+"), strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("mode", MODES)
def test_through_verls_ppo_loss(name: str, mode: str) -> None:
    """As a worker calls it: nested log-probabilities, verl's own entropy and KL terms, of each kind, added in place."""
    batch = ragged_batch(LOSSES[name], weights="sequence")
    found = {}
    for loss_mode in (name, "gspo"):
        data, given, tools = model_batch(batch)
        leaf = tools["nested"](given["log_prob"].detach()).values().clone().requires_grad_()
        offsets = tools["nested"](given["log_prob"].detach()).offsets()
        output = {"log_probs": torch.nested.nested_tensor_from_jagged(leaf, offsets)}
        output["entropy"] = torch.nested.nested_tensor_from_jagged(leaf.detach() ** 2, offsets)
        at = config(
            clip_ratio_c=None, loss_agg_mode=mode, use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.01,
            policy_loss=PolicyLossConfig(loss_mode=loss_mode), kl_loss_type=KL_KINDS[mode],
        )  # fmt: skip
        loss, metrics = ppo_loss(at, output, data)
        loss.backward()
        found[loss_mode] = (
            loss.detach(),
            leaf.grad,
            {k: getattr(x, "aggregate", lambda x=x: x)() for k, x in metrics.items()},
        )
    (ours, gradient, metrics), (theirs, their_gradient, their_metrics) = found[name], found["gspo"]
    size = sum(abs(x) for x in their_metrics.values())
    check_number("loss", float(ours), float(theirs), 1e-6 * size)
    assert gradient is not None and their_gradient is not None
    check_close("gradient", gradient, their_gradient, 1e-6 * (their_gradient.abs() + their_gradient.abs().max() / 10))
    assert set(their_metrics) <= set(metrics)
    for key, x in their_metrics.items():
        check_number(key, metrics[key], x, 1e-6 * (1 + abs(x)))
