"""Each argument of each public function: wrong values are refused by name, and torch's defaults change nothing."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from modes import DEFAULT_MODE, NOT_INTERPRETED, on_device, sized
from torch import Tensor

import gspo_kernels
from gspo_kernels.base import checks

B, T, V, D = 2, 3, 5, 4


@pytest.fixture(autouse=True)
def checks_that_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")


# --- valid arguments of each function, and of what kind each is -------------------------------------------------------

LOGITS = torch.linspace(-2, 2, B * T * V, device="cpu").view(B, T, V).sin()
HIDDEN, HEAD = torch.linspace(-1, 1, B * T * D).view(B, T, D).cos(), torch.linspace(-3, 3, V * D).view(V, D).sin()
IDS = torch.tensor([[0, 1, 2], [3, 4, 0]])
MASK = torch.tensor([[True, True, False], [True, True, True]])
OLD, REF = torch.full((B, T), -1.5), torch.linspace(-2, -1, B * T).view(B, T)
VLLM = [{"choices": [{"finish_reason": "stop", "token_ids": [5, 7], "logprobs": {"token_logprobs": [-0.5, -1.5]}}]}]
META = {"output_token_logprobs": [[-0.5, 5, None], [-1.5, 7, None]], "finish_reason": {"type": "stop"}}

OF_TOKENS: dict[str, Any] = {
    "mask": MASK, "ref_logprobs": REF, "beta": 0.1, "kl_estimator": "k2", "kl_weighting": "ratio",
    "entropy_coef": 0.01,
    "importance_weights": torch.tensor([1.5, 0.5]), "rollout_logprobs": OLD - 0.1, "aggregation": "group_mean",
    "group_tokens": torch.tensor([5.0, 5.0]), "normalizer": torch.tensor(7.0), "max_log_ratio": 15.0, "cp_group": None,
}  # fmt: skip
OF_ROWS: dict[str, Any] = {
    "temperature": torch.full((B, T), 1.25), "logit_scale": 0.5, "softcap": 20.0,
    "tp_group": None, "vocab_start": None, "vocab_size": V, "backend": None,
}  # fmt: skip
ON_TOKENS: dict[str, Any] = {"token_ids": IDS, "advantages": torch.tensor([1.0, -2.0]), "old_logprobs": OLD}
OF_ROLLOUT: dict[str, Any] = {"mask": MASK, "cu_seqlens": None, "max_log_ratio": 15.0, "cp_group": None}
OF_VALUES: dict[str, Any] = {
    "returns": OLD, "old_values": OLD + 0.1, "clip_range": 0.2, "mask": MASK, "aggregation": "group_mean",
    "group_tokens": torch.tensor([5.0, 5.0]), "normalizer": torch.tensor(7.0),
}  # fmt: skip
VALID: dict[str, dict[str, Any]] = {
    "policy_loss": {
        "logits": LOGITS, **ON_TOKENS, "objective": gspo_kernels.DPPO(0.01, 0.02), **OF_TOKENS, **OF_ROWS,
        "kept": None, "overwrite_logits": False,
    },
    "linear_policy_loss": {
        "hidden": HIDDEN, "weight": HEAD, **ON_TOKENS, "objective": gspo_kernels.DPPO(), "bias": HEAD[:, 0].clone(),
        "low_rank": None, **OF_TOKENS, **OF_ROWS, "entropy_coef": 0.0, "beta": 0.0, "chunk_bytes": 256,
        "skip_zero_advantage": False, "kept": None, "sparse_weight_grad": False,
    },
    "policy_loss_from_logprobs": {
        "logprobs": REF, "advantages": torch.tensor([1.0, -2.0]), "old_logprobs": OLD,
        "objective": gspo_kernels.DPPO(), "entropy": -REF, **OF_TOKENS,
    },
    "token_logprobs": {
        "logits": LOGITS, "token_ids": IDS, "mask": MASK, **OF_ROWS, "kept": None, "full_distribution": True,
        "overwrite_logits": False,
    },
    "linear_token_logprobs": {
        "hidden": HIDDEN, "weight": HEAD, "token_ids": IDS, "bias": HEAD[:, 0].clone(), "mask": MASK, **OF_ROWS,
        "chunk_bytes": 256, "low_rank": None, "kept": None, "full_distribution": True, "sparse_weight_grad": False,
    },
    "rollout_weights": {
        "logprobs": OLD, "rollout_logprobs": REF, **OF_ROLLOUT, "level": "sequence_sum", "mode": "mask", "lower": 0.5,
        "upper": 1.5,
    },
    "rollout_mismatch": {
        "logprobs": OLD, "rollout_logprobs": REF, "advantages": torch.tensor([1.0, -2.0]), **OF_ROLLOUT,
        "eps_low": 0.1, "eps_high": 0.2, "noise": 0.5,
    },
    "suggest_clip_range": {
        "log_ratio": REF + 1.5, "advantages": torch.tensor([1.0, -2.0]), "share": 0.6, "mask": MASK, "cu_seqlens": None,
        "ratio_of": "sequence", "current": (0.1, 0.2), "noise": torch.tensor(0.01), "cp_group": None, "group": None,
    },
    "diagnose_mismatch": {
        "logits": LOGITS, "token_ids": IDS, "old_logprobs": OLD, "mask": MASK, "cu_seqlens": None,
        "temperature": torch.full((B, T), 1.25), "kept": None, "vocab_size": V, "logprobs": None,
    },
    "group_advantages": {
        "rewards": torch.tensor([1.0, 0.0, 3.0, 4.0]), "group_size": 2, "baseline": "leave_one_out",
        "normalize": "std", "eps": 0.1, "group": None,
    },
    "whiten_advantages": {"advantages": REF, "mask": MASK, "eps": 0.1, "group": None},
    "gae": {
        "rewards": OLD, "values": REF, "gamma": 0.5, "lam": 0.5, "mask": MASK, "last_values": torch.tensor([1.0, 0.0]),
    },
    "value_loss": {"values": REF, **OF_VALUES},
    "linear_value_loss": {"hidden": HIDDEN, "weight": HEAD[:1].clone(), "bias": HEAD[0, :1].clone(), **OF_VALUES},
    "linear_values": {"hidden": HIDDEN, "weight": HEAD[:1].clone(), "bias": HEAD[0, :1].clone(), "mask": MASK},
    "global_count": {
        "mask": MASK.view(-1), "cu_seqlens": torch.tensor([0, 2, 6]), "aggregation": "group_mean",
        "group_tokens": torch.tensor([5.0, 5.0]), "advantages": torch.tensor([1.0, 0.0]), "group_size": 1,
        "group": None, "cp_group": None,
    },
    "next_token_targets": {"input_ids": IDS, "mask": MASK},
    "from_vllm": {"outputs": VLLM, "prompt_ids": [[1, 2]], "missing": "mask", "device": None},
    "from_sglang": {
        "outputs": [{"meta_info": META}], "prompt_ids": [[1, 2]], "experts_shape": (1, 2), "missing": "mask",
        "device": None,
    },
    "GSPO": {"eps_low": 0.1, "eps_high": 0.1, "dual_clip": 3.0},
    "GMPO": {"eps_low": 0.1, "eps_high": 0.1},
    "SAPO": {"tau_pos": 1.0, "tau_neg": 2.0},
    "CISPO": {"eps_low": 0.1, "eps_high": 0.1},
    "DPPO": {"delta_low": 0.1, "delta_high": 0.1, "max_ratio": 3.0, "divergence": "kl"},
    "DRO": {"penalty": 0.1},
}  # fmt: skip
VALID["packed"] = (
    {  # of policy_loss
        name: x.flatten(0, 1) if isinstance(x, Tensor) and x.shape[:2] == (B, T) else x
        for name, x in VALID["policy_loss"].items()
    }
    | {"cu_seqlens": torch.tensor([0, 3, 6], dtype=torch.int32)}
)
VALID["from logprobs"] = VALID["diagnose_mismatch"] | {"logits": None, "logprobs": REF}
VALID["by group_ids"] = {"rewards": torch.tensor([1, 0, 3, 4]), "group_ids": torch.tensor([5, 5, 7, 7])}
FUNCTIONS = {"packed": "policy_loss", "by group_ids": "group_advantages", "from logprobs": "diagnose_mismatch"}
DIAGNOSED = {("diagnose_mismatch", "old_logprobs"), ("from logprobs", "old_logprobs")}  # taken with their mistakes
KINDS = {
    "operand": ("logits", "hidden", "weight", "bias"),
    "ids": ("token_ids", "input_ids", "group_ids"),
    "boundaries": ("cu_seqlens",),
    "mask": ("mask",),
    "numbers": ("advantages", "importance_weights", "rewards", "group_tokens", "returns", "last_values"),
    "floats": ("values", "old_values", "log_ratio"),
    "log-probabilities": ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy"),
    "number or tensor": ("temperature", "normalizer"),
    "number": ("beta", "entropy_coef", "max_log_ratio", "eps", "eps_low", "eps_high", "dual_clip", "noise", "lower",
               "upper", "tau_pos", "tau_neg", "delta_low", "delta_high", "max_ratio", "penalty", "gamma", "lam",
               "clip_range", "logit_scale", "softcap"),
    "share": ("share",),
    "whole": ("vocab_size", "chunk_bytes", "group_size"),
    "choice": ("kl_estimator", "kl_weighting", "divergence", "aggregation", "backend", "level", "mode", "baseline",
               "normalize", "missing", "ratio_of"),
    "flag": ("overwrite_logits", "skip_zero_advantage", "full_distribution", "sparse_weight_grad"),
    "other": ("objective", "low_rank", "tp_group", "cp_group", "group", "vocab_start", "outputs", "prompt_ids",
              "device", "kept", "experts_shape", "current"),
}  # fmt: skip
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names}
FIRST = (
    "logits",
    "hidden",
    "logprobs",
    "rewards",
    "values",
    "input_ids",
    "log_ratio",
)  # whose device the others have to be on
DIFFERENTIABLE = ("logits", "hidden", "logprobs", "values")
F8 = torch.float8_e4m3fn


def function_of(case: str) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(gspo_kernels, FUNCTIONS.get(case, case))
    return found


def valid(case: str) -> dict[str, Any]:
    return {name: on_device(x) if isinstance(x, Tensor) else x for name, x in VALID[case].items()}


def wrong(case: str, name: str, x: Any) -> Iterator[Any]:
    """Values that are refused whatever the rest is."""
    kind = "number or tensor" if isinstance(x, Tensor) and name == "noise" else KIND_OF[name]
    if x is None and kind in ("boundaries", "mask", "operand", "log-probabilities"):
        yield from ([0, 6], "text", np.zeros(2))
        return
    if isinstance(x, Tensor):
        if x.ndim:
            yield x.tolist()
        if (case, name) not in {("global_count", "mask"), ("packed", "logits")}:  # which may have two dimensions, three
            yield x[None]
        yield from (x.cpu().numpy(), "text", {}, x.to(torch.complex64))
        yield from (x.reshape(1, -1).to_sparse(), torch.nested.nested_tensor([x.cpu()]))
        if name not in FIRST and (case, name) not in {("global_count", "mask"), ("whiten_advantages", "advantages")}:
            yield x.to("meta")
    if kind == "operand":
        yield from (x.long(), x.bool(), x.to(F8))
    if kind in ("ids", "boundaries"):
        yield from (x.float(), x.bool())
    if kind in ("numbers", "floats", "log-probabilities", "number or tensor"):
        yield from (x.bool(), x.to(F8))
        yield from () if (case, name) in DIAGNOSED else (x.bfloat16(), x.half())
    if kind in ("floats", "log-probabilities") or name == "temperature":
        yield x.long()
    if name.endswith("logprobs") and (case, name) not in DIAGNOSED:
        yield x.exp()  # probabilities
        yield -x  # negative log-likelihoods
    if kind == "number or tensor":
        yield from (-1.0, math.nan, 10**400, True, "1", 1j)
        yield from () if name == "noise" else (0.0,)
    if kind == "share":
        yield from (0.0, 1.0, 15, math.nan, "1", True, torch.tensor(0.1), [0.1])
    if kind == "number":
        yield from (math.nan, -math.inf, 10**400, "1", True, 1j, torch.tensor(0.1), [0.1], np.array([0.1, 0.2]))
    if kind == "whole":
        yield from (2.5, "2", True, 0, -1, 2**63, torch.tensor(2), np.float64(2), np.True_, np.array([2]))
    if kind == "choice":
        yield from ("unknown", 3, True, torch.zeros(2), [])
    if kind == "flag":
        yield from ("yes", 1, None, torch.tensor(True))
    if kind == "other":
        yield from ("text", 3.5, object())


@pytest.mark.parametrize("case", [case for case, given in VALID.items() if set(KINDS["whole"]) & set(given)])
@NOT_INTERPRETED
def test_whole_numbers_of_numpy(case: str) -> None:
    """As Python's own, in each argument that is a whole number; vocab_start goes the same way, with a group alone."""
    given = valid(case)
    others = {name: np.int32(given[name]) for name in KINDS["whole"] if isinstance(given.get(name), int)}
    same(function_of(case)(**given | others), function_of(case)(**given))


@pytest.mark.parametrize(
    ("value", "shown"), [(np.float64(2.5), "float64 2.5"), (np.array(2.5), "ndarray 2.5"), (2.5, "float 2.5")]
)
def test_no_whole_number(value: Any, shown: str) -> None:
    with pytest.raises(TypeError, match=rf"^group_size: expected how many .*, a whole number; got {shown}$"):
        gspo_kernels.group_advantages(torch.ones(4), group_size=value)


def test_whole_numbers_of_vocabulary_shards() -> None:
    assert checks.whole("vocab_start", np.uint8(3), "the first column", at_least=0) == 3
    assert type(checks.whole("vocab_start", np.uint8(3), "the first column", at_least=0)) is int
    with pytest.raises(ValueError, match="vocab_start: expected the first column, at least 0; got -1"):
        checks.whole("vocab_start", np.int64(-1), "the first column", at_least=0)


@pytest.mark.parametrize("case", VALID)
@NOT_INTERPRETED
def test_wrong_values_are_refused_by_name(case: str) -> None:
    function, given = function_of(case), valid(case)
    function(**given)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype
        for name, x in given.items():
            for value in wrong(case, name, x):
                with pytest.raises((TypeError, ValueError)) as error:
                    function(**{**given, name: value})
                    pytest.fail(f"{name}: taken: {value!r}")
                assert str(error.value).startswith(name), f"{name}={value!r}: {error.value}"
                assert "expected" in str(error.value), f"{name}={value!r}: {error.value}"


def test_every_argument_of_every_function_is_tried() -> None:
    for case in set(VALID) - {"packed", "by group_ids", "from logprobs"}:
        others = {"policy_loss": "packed", "group_advantages": "by group_ids"}
        tried = VALID[case].keys() | VALID.get(others.get(case, ""), {}).keys()
        names = {name for name in inspect.signature(function_of(case)).parameters}
        assert names - tried <= {"cu_seqlens", "averaged", "group_ids"}, case


# --- what is said of some ---------------------------------------------------------------------------------------------


@NOT_INTERPRETED
@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "logprobs", "rollout_logprobs"])
def test_rounded_log_probabilities_are_refused_with_the_reason_and_the_remedy(name: str) -> None:
    cases = ["policy_loss", "packed", "linear_policy_loss", "policy_loss_from_logprobs", "rollout_weights"]
    for case in [c for c in cases if name in VALID[c]]:
        given = valid(case)
        with pytest.raises(TypeError, match=f"^{name}: .*twenty times GSPO's clip range.*bfloat16") as error:
            function_of(case)(**given | {name: given[name].bfloat16()})
        assert "MixedPrecisionPolicy(cast_forward_inputs=False)" in str(error.value)


@NOT_INTERPRETED
def test_integers_are_numbers_and_float64_is_more() -> None:
    """Of whole numbers the results have the same bits; of float64, to rounding."""
    given = valid("policy_loss") | {"importance_weights": on_device(torch.tensor([2.0, 1.0]))}
    loss = gspo_kernels.policy_loss(**given).loss
    whole = {name: given[name].long() for name in ("advantages", "importance_weights", "normalizer")}
    near: dict[str, Any] = {"rtol": 1e-6, "atol": 0.0}
    torch.testing.assert_close(gspo_kernels.policy_loss(**given | whole).loss, loss, **near)
    wide = {
        n: x.double() for n, x in given.items() if KIND_OF[n] in ("numbers", "log-probabilities", "number or tensor")
    }
    torch.testing.assert_close(gspo_kernels.policy_loss(**given | wide).loss, loss, **near)


@NOT_INTERPRETED
@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64], ids=lambda x: str(x.__name__))
def test_numbers_of_numpy(kind: Any) -> None:
    for case in VALID:
        given = valid(case)
        of_numpy = {n: kind(2) if n == "dual_clip" else kind(1) for n in given if KIND_OF[n] == "number"}
        of_numpy |= {n: kind(1) for n in ("temperature", "normalizer") if n in given}
        plain = {n: float(x) for n, x in of_numpy.items()}
        if of_numpy:
            same(function_of(case)(**given | of_numpy), function_of(case)(**given | plain))


@NOT_INTERPRETED
def test_a_temperature_for_each_row_of_a_padded_batch() -> None:
    by_row = on_device(torch.tensor([[0.5], [2.0]]))
    for case in ("policy_loss", "linear_policy_loss", "token_logprobs", "linear_token_logprobs"):
        given = valid(case)
        by_token = given | {"temperature": by_row.expand(B, T).clone()}
        same(function_of(case)(**given | {"temperature": by_row}), function_of(case)(**by_token))
        with pytest.raises(ValueError, match=r"^temperature: .*temperature\[:, None\].*got \[2\]"):
            function_of(case)(**given | {"temperature": by_row[:, 0]})
    with pytest.raises(ValueError, match=r"^temperature: .*repeat_interleave\(cu_seqlens.diff\(\)\).*got \[2, 1\]"):
        gspo_kernels.policy_loss(**valid("packed") | {"temperature": by_row})


@DEFAULT_MODE
def test_dtensors_are_refused_with_the_remedy(group_of_one: dist.ProcessGroup | None) -> None:
    if group_of_one is None:
        pytest.skip("needs torch.distributed with gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    for case, given in VALID.items():
        for name, x in given.items():
            if isinstance(x, Tensor) and name not in ("logits", "weight", "hidden", "bias"):
                with pytest.raises(TypeError, match=rf"^{name}: .*DTensor.*full_tensor\(\).*to_local\(\)"):
                    function_of(case)(**given | {name: distribute_tensor(x, mesh, [Replicate()])})


@NOT_INTERPRETED
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs"])
def test_positive_log_probabilities(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused where they count; NaN, -inf and what is rounded up pass."""
    monkeypatch.setenv("GSPO_KERNELS_DEBUG", "1")  # a GPU is not waited for otherwise
    cases = ["policy_loss", "policy_loss_from_logprobs", "linear_policy_loss", "rollout_weights", "rollout_mismatch"]
    for case in [c for c in cases if name in VALID[c]]:
        function, given = function_of(case), valid(case)
        for value in (math.nan, -math.inf, 9e-4):
            x = given[name].clone()
            x[1, 1] = value
            function(**given | {name: x})
        at_masked = given[name].masked_fill(~given["mask"], 7.0)
        same(function(**given | {name: at_masked}), function(**given))
        with pytest.raises(ValueError, match=f"^{name}: .*got 1 above, the first 0.25. Got probabilities or negative"):
            x = at_masked.clone()
            x[1, 2] = 0.25
            function(**given | {name: x})


# --- views that share memory ------------------------------------------------------------------------------------------

VIEWS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "sliced": (lambda x: x[:, :-1], True),
    "every other": (lambda x: x[::2, ::2, ::3], True),
    "transposed": (lambda x: x.transpose(0, 1), True),
    "permuted": (lambda x: x.permute(2, 0, 1), True),
    "one row, expanded": (lambda x: x[:1, :1].expand(1, 1, -1), True),
    "strides of a dimension of one": (lambda x: x.as_strided((1, 3, 7), (0, 7, 1)), True),
    "empty": (lambda x: x[:0].as_strided((0, 3, 7), (0, 0, 0)), True),
    "expanded": (lambda x: x[:, :1].expand(-1, 3, -1), False),
    "windows": (lambda x: x.flatten().unfold(0, 7, 3), False),
    "windows of rows": (lambda x: x.flatten(0, 1).unfold(0, 2, 1).transpose(1, 2), False),
    "rows one number apart": (lambda x: x.as_strided((2, 3, 7), (21, 1, 1)), False),
    "sequences that overlap": (lambda x: x.as_strided((2, 3, 7), (14, 7, 1)), False),
}


@pytest.mark.parametrize("view", VIEWS)
@NOT_INTERPRETED
def test_logits_that_share_memory_are_not_written_over(view: str) -> None:
    make, fine = VIEWS[view]
    base = on_device(torch.linspace(-1, 1, 4 * 4 * 7).view(4, 4, 7))
    logits, before = make(base), base.clone()
    options: dict[str, Any] = {"token_ids": torch.zeros(logits.shape[:-1], dtype=torch.int64, device=base.device)}
    if fine:
        gspo_kernels.token_logprobs(logits, overwrite_logits=True, **options)
        return
    gspo_kernels.token_logprobs(logits, **options)
    with pytest.raises(ValueError, match=r"^overwrite_logits: .*share memory"):
        gspo_kernels.token_logprobs(logits, overwrite_logits=True, **options)
    assert torch.equal(base, before)


# --- torch's defaults -------------------------------------------------------------------------------------------------


def leaves(found: Any) -> list[Any]:
    if isinstance(found, Tensor) or found is None or isinstance(found, (str, float, int)):
        return [found]
    parts = vars(found).values() if hasattr(found, "__dict__") else found
    return [leaf for part in parts for leaf in leaves(part)]


def same(found: Any, expected: Any) -> None:
    for x, y in zip(leaves(found), leaves(expected), strict=True):
        if not isinstance(y, Tensor):
            assert x == y
            continue
        assert x.device == y.device and x.dtype == y.dtype
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


def everything(case: str, given: dict[str, Any]) -> list[Any]:
    """What the function returns and the gradients of what is differentiable; also on-policy, where there is that."""
    variants = [given, given | {"old_logprobs": None, "beta": 0.0, "entropy_coef": 0.0}][: 1 + ("beta" in given)]
    if "temperature" in given:
        variants.append(given | {"temperature": 1.5, **({"normalizer": 7} if "normalizer" in given else {})})
    out: list[Any] = []
    for variant in variants:
        inputs = {
            name: variant[name].clone().requires_grad_() for name in DIFFERENTIABLE if variant.get(name) is not None
        }
        found = function_of(case)(**variant | inputs)
        out += [found]
        scalar = getattr(found, "loss", None)
        if scalar is None and case.endswith("token_logprobs"):
            scalar = found.logprobs.sum() + found.entropy.sum()
        if scalar is not None:
            scalar.backward()
            out += [x.grad for x in inputs.values()]
        if case in ("from_vllm", "from_sglang"):
            out += [found.with_prompts()]
    return out


@pytest.mark.parametrize("case", [case for case in sized(list(VALID), ["packed"]) if case != "GSPO"])
def test_the_defaults_of_torch_change_nothing(case: str) -> None:
    """The default device and the default dtype: whatever is made is made where the arguments are, as exact as ever."""
    given = valid(case)
    expected = everything(case, given)
    try:
        torch.set_default_device("meta")
        on_meta = everything(case, given)
    finally:
        torch.set_default_device(None)
    same(on_meta, expected)
    for dtype in sized([torch.float64, torch.float16], []):
        try:
            torch.set_default_dtype(dtype)
            other = everything(case, given)
        finally:
            torch.set_default_dtype(torch.float32)
        same(other, expected)
