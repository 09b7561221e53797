"""An objective of one's own: what it may say, what is refused by name, and threads that share one."""

from __future__ import annotations

import sys
import threading
from dataclasses import InitVar, dataclass, replace
from functools import partial
from typing import Any, ClassVar

import oracle
import pytest
import torch
from linear import from_hidden, problem
from modes import NOT_INTERPRETED, on_device
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode

from gspo_kernels import (
    DPPO,
    GRPO,
    GSPO,
    Objective,
    Terms,
    TokenBatch,
    linear_policy_loss,
    policy_loss,
    policy_loss_from_logprobs,
)
from gspo_kernels.linear import operators
from gspo_kernels.losses import objectives
from gspo_kernels.losses.triton_term import TritonTerm

pytestmark = NOT_INTERPRETED  # an objective of one's own is computed by torch


class OfToken(Objective):
    depends_on: ClassVar[str] = "token"

    def terms(self, tokens: TokenBatch) -> Terms:
        return Terms(-tokens.log_ratio.exp() * tokens.advantages, tokens.log_ratio)


class OfSequence(Objective):
    ratio_of: ClassVar[str] = "sequence"
    advantages_per_token: ClassVar[bool] = False
    depends_on: ClassVar[str] = "sequence"

    def terms(self, tokens: TokenBatch) -> Terms:
        mean = tokens.layout.mean(tokens.log_ratio)
        return Terms(-mean.exp() * tokens.advantages, mean)


LOGITS = on_device(torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0)))
IDS, ADVANTAGES = on_device(torch.tensor([[1, 2, 3], [4, 5, 6]])), on_device(torch.tensor([1.0, -1.0]))
OLD = on_device(torch.full((2, 3), -2.0))
CALLS = {
    "logits": lambda objective: policy_loss(LOGITS, IDS, ADVANTAGES, OLD, objective=objective),
    "hidden": lambda objective: linear_policy_loss(
        LOGITS, on_device(torch.eye(7)), IDS, ADVANTAGES, OLD, objective=objective
    ),
    "log-probabilities": lambda objective: policy_loss_from_logprobs(OLD, ADVANTAGES, OLD, objective=objective),
}
by_call = pytest.mark.parametrize("call", CALLS)


@by_call
@pytest.mark.parametrize(
    ("attribute", "value", "kind"),
    [
        ("ratio_of", "sequences", ValueError),
        ("ratio_of", None, ValueError),
        ("depends_on", "tokens", ValueError),
        ("aggregation", "mean", ValueError),
        ("advantages_per_token", "no", TypeError),
        ("uses_logprobs", "yes", TypeError),
        ("by_sequence_alone", 1, TypeError),
        ("by_sequence_alone", True, ValueError),  # with a ratio per token
    ],
)
@pytest.mark.parametrize("of_instance", [False, True], ids=["class", "instance"])
def test_a_misspelt_attribute_is_refused_by_name(
    call: str, attribute: str, value: Any, kind: type[Exception], of_instance: bool
) -> None:
    objective = OfToken() if of_instance else type("Misspelt", (OfToken,), {attribute: value})()
    if of_instance:
        setattr(objective, attribute, value)
    with pytest.raises(kind, match=rf"{type(objective).__name__}\.{attribute}: expected .*; got "):
        CALLS[call](objective)


def own_term(
    log_ratio: Any, advantage: Any, bound: Any, new: Any, old: Any, rollout: Any, a: Any, b: Any, c: Any, d: Any
) -> Any:
    return log_ratio, new * advantage, None, None


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"depend_on": "token"}, r"expected depends_on; got depend_on = 'token'"),
        ({"together": "token"}, r"expected ratio_of or depends_on; got together = 'token'"),
        ({"reduction": "token_mean"}, r"expected aggregation; got reduction = 'token_mean'"),
        ({"use_logprobs": True}, r"expected uses_logprobs; got use_logprobs = True"),
        ({"triton_terms": TritonTerm(own_term)}, r"expected triton_term; got triton_terms = "),
        ({"triton_term": TritonTerm(own_term)}, r"\.uses_logprobs: expected True, because triton_term reads them"),
        ({"triton_term": own_term}, r"\.triton_term: expected a function under @TritonTerm; got function"),
        (
            {"terms": lambda self, log_ratio, advantages, layout, max_log_ratio: None},
            r"\.terms: expected terms\(self, tokens\), .*; got terms\(self, log_ratio, advantages, layout, max_log",
        ),
        ({"terms": lambda self: None}, r"\.terms: expected terms\(self, tokens\), .*; got terms\(self\)"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_a_class_that_would_compute_another_loss_is_refused(attributes: dict[str, Any], message: str) -> None:
    """Where it is defined: a misspelt attribute would be ignored."""
    with pytest.raises(TypeError, match=f"^Wrong:? ?{message}"):
        type("Wrong", (Objective,), attributes)


def test_a_term_has_ten_parameters() -> None:
    with pytest.raises(TypeError, match=r"short: expected 10 parameters: log_ratio, .*; got \(log_ratio"):

        @TritonTerm
        def short(log_ratio: Any, advantage: Any) -> Any:
            return log_ratio, advantage


def test_attributes_of_ones_own_are_accepted() -> None:
    @dataclass(frozen=True)
    class Own(OfToken):
        level: str = "token"  # a field
        eps_high: float = 0.2
        name: ClassVar[str] = "own"
        strict: ClassVar[bool] = True
        _level: ClassVar[str] = "token"

        def terms(self, tokens: TokenBatch, *, scale: float = 1.0) -> Terms:
            return super().terms(tokens)

        @property
        def bound(self) -> float:
            return self.eps_high

    CALLS["logits"](Own())


def test_a_class_without_terms_is_refused_by_name() -> None:
    class Empty(Objective):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty\.terms: expected a method terms\(self, tokens\); got none"):
        CALLS["logits"](Empty())


@by_call
def test_a_class_is_refused_as_one(call: str) -> None:
    with pytest.raises(TypeError, match=r"objective: expected an Objective .* got the class GSPO"):
        CALLS[call](GSPO)


WRONG: dict[str, Any] = {
    "loss: expected shape": lambda x, n: Terms(x.sum(), x),
    "loss: expected torch.float64": lambda x, n: Terms(x.float(), x),
    "loss: expected one per": lambda x, n: Terms(1.0, x),  # type: ignore[arg-type]
    "log_ratio: expected shape": lambda x, n: Terms(x, x.new_zeros(n + 1)),
    "log_ratio: expected torch.float64": lambda x, n: Terms(x, x > 0),
    "clipped_low: expected torch.bool": lambda x, n: Terms(x, x, x),
    "clipped_high: expected shape": lambda x, n: Terms(x, x, None, x[:1] > 0),
    "expected it to return Terms": lambda x, n: (x, x),
}


@by_call
@pytest.mark.parametrize("message", WRONG)
@pytest.mark.parametrize("base", [OfToken, OfSequence])
def test_terms_that_do_not_fit_are_refused(call: str, message: str, base: type[Objective]) -> None:
    class Wrong(base):  # type: ignore[misc, valid-type]
        def terms(self, tokens: TokenBatch) -> Any:
            right = super().terms(tokens).loss
            return WRONG[message](right, right.shape[0])

    with pytest.raises((TypeError, ValueError), match=rf"Wrong\.terms: {message}"):
        CALLS[call](Wrong())


def test_the_default_is_the_safe_one() -> None:
    assert Objective.depends_on == "batch"


# --- log-probabilities, beside the log-ratio --------------------------------------------------------------------------


@dataclass(frozen=True)
class LikeCISPO(Objective):
    """-sg(min(ratio, 1 + eps)) A logprob: its gradient does not come through the log-ratio."""

    eps: float = 0.25
    least: float | None = None
    depends_on: ClassVar[str] = "token"
    uses_logprobs: ClassVar[bool] = True

    def terms(self, tokens: TokenBatch) -> Terms:
        weight = objectives.at_most(tokens.log_ratio.detach().exp(), 1.0 + self.eps)
        if self.least is not None:
            weight = torch.where(weight < self.least, self.least, weight)
        return Terms(-weight * tokens.advantages * tokens.logprobs, tokens.log_ratio)


@by_call
@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "entropy"])
def test_undeclared_log_probabilities_are_refused(call: str, name: str) -> None:
    class Reads(OfToken):
        def terms(self, tokens: TokenBatch) -> Terms:
            getattr(tokens, name)
            return super().terms(tokens)

    with pytest.raises(RuntimeError, match=rf"tokens\.{name}: .*uses_logprobs: ClassVar\[bool\] = True"):
        CALLS[call](Reads())


@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("call", ["logits", "hidden"])
def test_declared_log_probabilities(call: str, on_policy: bool) -> None:
    """The gradient reaches the logits through them, on-policy too."""
    operand = LOGITS.clone().requires_grad_()
    old = None if on_policy else OLD
    if call == "logits":
        loss, _ = policy_loss(operand, IDS, ADVANTAGES, old, objective=LikeCISPO())
    else:
        loss, _ = linear_policy_loss(operand, on_device(torch.eye(7)), IDS, ADVANTAGES, old, objective=LikeCISPO())
    (gradient,) = torch.autograd.grad(loss, operand)
    truth = LOGITS.double().clone().requires_grad_()
    logprobs = truth.log_softmax(-1).gather(-1, IDS[..., None])[..., 0]
    weight = torch.ones_like(logprobs) if old is None else (logprobs - OLD).exp().clamp(max=1.25)
    expected = (-weight.detach() * ADVANTAGES[:, None] * logprobs).mean()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient.double(), *torch.autograd.grad(expected, truth), rtol=1e-5, atol=1e-7)


def test_what_declared_log_probabilities_are() -> None:
    seen: list[TokenBatch] = []

    class Looks(OfToken):
        uses_logprobs: ClassVar[bool] = True

        def terms(self, tokens: TokenBatch) -> Terms:
            seen.append(tokens)
            return super().terms(tokens)

    leaf = OLD.clone().requires_grad_()
    policy_loss_from_logprobs(leaf, ADVANTAGES, objective=Looks(), entropy=-OLD)
    policy_loss_from_logprobs(leaf, ADVANTAGES, OLD - 1.0, objective=Looks())
    on_policy, off_policy = seen
    assert on_policy.logprobs.requires_grad and not on_policy.old_logprobs.requires_grad
    assert torch.equal(on_policy.logprobs, on_policy.old_logprobs)
    assert on_policy.entropy is not None and on_policy.entropy.tolist() == [2.0] * 6 and off_policy.entropy is None
    assert off_policy.old_logprobs.tolist() == [-3.0] * 6


# --- how they travel through operators --------------------------------------------------------------------------------


def test_frozen_dataclasses_of_floats_are_rebuilt() -> None:
    objectives_of_floats = (
        LikeCISPO(), LikeCISPO(0.5, 0.1), KeywordsAlone(), KeywordsAlone(third=2.0), GSPO(), GSPO(0.1, 0.2, 3.0),
        GRPO(eps_low=0.0),
    )  # fmt: skip
    for objective in objectives_of_floats:
        key = objective.packed()
        assert objective.packed_parameters() is not None and Objective.unpacked(key) == objective
        unread = Objective.unpacked(key._replace(parameters=()))
        assert type(unread) is type(objective) and unread.depends_on == objective.depends_on


def test_a_default_that_depends_on_another_field() -> None:
    """DPPO's deltas are those of the divergence that the objective has in the end."""
    assert DPPO().deltas() == (0.15, 0.15) and replace(DPPO(), divergence="kl").deltas() == (0.05, 0.05)
    assert replace(DPPO(delta_low=0.1), divergence="kl").deltas() == (0.1, 0.05)


@dataclass(frozen=True)
class WithTensor(OfToken):
    weights: Tensor


@dataclass(frozen=True, kw_only=True)
class KeywordsAlone(LikeCISPO):
    third: float | None = None


@dataclass(frozen=True)
class ForTypeCheckers(LikeCISPO):
    source: ClassVar[ImportedForTypeCheckersAlone | None] = None  # type: ignore # noqa: F821


@dataclass(frozen=True)
class WithInitVar(LikeCISPO):
    scale: InitVar[float] = 1.0

    def __post_init__(self, scale: float) -> None:
        object.__setattr__(self, "eps", self.eps * scale)


def test_any_other_objective_is_carried() -> None:
    @dataclass(frozen=True)
    class Local(LikeCISPO):
        pass

    for objective in (OfToken(), Local(), WithTensor(ADVANTAGES), WithInitVar(0.1, scale=2.0), ForTypeCheckers()):
        key = objective.packed()
        assert objective.packed_parameters() is None and key.parameters == ()
        with objectives.carried(objective):
            assert Objective.unpacked(key) is objective


def test_a_class_that_is_defined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook: each instance is computed by the class that it has, not by another class of the same name."""

    def loss(objective: Objective) -> float:
        return float(CALLS["hidden"](objective).loss)

    before = LikeCISPO(0.5)
    expected = loss(before)

    @dataclass(frozen=True)
    class Negative(LikeCISPO):
        def terms(self, tokens: TokenBatch) -> Terms:
            found = super().terms(tokens)
            return Terms(-found.loss, found.log_ratio)

    Negative.__qualname__ = "LikeCISPO"
    monkeypatch.setattr(sys.modules[__name__], "LikeCISPO", Negative)
    assert loss(before) == expected and loss(Negative(0.5)) == -expected


@pytest.mark.plain_memory
def test_ones_own_in_one_graph() -> None:
    """From hidden states as well; a parameter is a run-time value."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    head = on_device(torch.eye(7))

    def work(hidden: Tensor, eps: float) -> Tensor:
        return linear_policy_loss(hidden, head, IDS, ADVANTAGES, OLD, objective=LikeCISPO(eps)).loss

    compiled = torch.compile(work, fullgraph=True, backend=counter)
    for eps in (0.1, 0.2, 0.3, 0.4):
        leaves = [LOGITS.clone().requires_grad_() for _ in range(2)]
        losses = [function(leaf, eps) for function, leaf in zip((work, compiled), leaves, strict=True)]
        assert torch.equal(*losses)
        assert torch.equal(*(torch.autograd.grad(x, y)[0] for x, y in zip(losses, leaves, strict=True)))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


# --- on the bounds ----------------------------------------------------------------------------------------------------


class NoClamp(TorchFunctionMode):
    """Refuses to differentiate torch.clamp, whose gradient on the bound is half of it since torch 2.14."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "").startswith(("clamp", "clip")):
            assert not any(isinstance(x, Tensor) and x.requires_grad for x in args), "clamp is differentiated"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("objective", ["gspo", "grpo"])
def test_on_a_bound_the_gradient_flows(objective: str, estimator: str) -> None:
    """Log-ratios and gaps to the reference exactly on max_log_ratio, and 2^-50, one digit, to either side of it."""
    bound, of_new = 2.0, -4.0  # all differences of log-probabilities are exact in float64
    ratios = [bound - 2**-50, bound, bound + 2**-50]
    gaps = [*ratios, *(-x for x in ratios)]
    pairs = [(r, g) for r in (*ratios, -bound, 0.0) for g in gaps]
    logprobs = torch.full((len(pairs),), of_new, dtype=torch.float64)
    old = torch.tensor([of_new - r for r, _ in pairs], dtype=torch.float64)
    ref = torch.tensor([of_new + g for _, g in pairs], dtype=torch.float64)
    advantages = torch.full((len(pairs),), -1.0)
    options: dict[str, Any] = {"beta": 0.5, "kl_estimator": estimator, "max_log_ratio": bound}
    leaf = on_device(logprobs).requires_grad_()
    classes = {"gspo": GSPO(), "grpo": GRPO()}
    with NoClamp():
        loss, _ = policy_loss_from_logprobs(
            leaf, on_device(advantages), on_device(old), objective=classes[objective], ref_logprobs=on_device(ref),
            cu_seqlens=on_device(torch.arange(len(pairs) + 1)), **options,
        )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, leaf)
    expected = oracle.evaluate(
        objective, [range(i, i + 1) for i in range(len(pairs))], [True] * len(pairs), logprobs.tolist(),
        [[-1.0]] * len(pairs), oracle.OBJECTIVES[objective].options(**options), old_logprobs=old.tolist(),
        ref_logprobs=ref.tolist(), weights=None, entropy=[0.0] * len(pairs),
    )  # fmt: skip
    torch.testing.assert_close(
        gradient.cpu(), torch.tensor(expected.d_logprobs, dtype=torch.float64), rtol=1e-12, atol=0.0
    )


# --- threads ----------------------------------------------------------------------------------------------------------


def test_threads_that_share_an_objective(monkeypatch: pytest.MonkeyPatch) -> None:
    """One has ended its loss, and the objective of another call has been set, before the other comes to its own."""
    p, objective = problem("grpo", seed=5, lengths=(2, 3)), OfToken()
    function = partial(linear_policy_loss, objective=objective)
    alone = from_hidden(p, "packed", "grpo", function=function)
    arrived, may_go = threading.Event(), threading.Event()
    operator = operators.linear_loss_operator

    def held(*arguments: Any) -> Any:
        if threading.current_thread() is late:
            arrived.set()
            assert may_go.wait(60)
        return operator(*arguments)

    monkeypatch.setattr(operators, "linear_loss_operator", held)
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(from_hidden(p, "packed", "grpo", function=function))
        except BaseException as error:
            found.append(error)

    late = threading.Thread(target=work)
    late.start()
    assert arrived.wait(60)
    early = from_hidden(p, "packed", "grpo", function=function)
    from_hidden(p, "packed", "gspo", function=partial(linear_policy_loss, objective=OfSequence()))
    may_go.set()
    late.join()
    for outcome in (early, *found):
        assert not isinstance(outcome, BaseException), repr(outcome)
        assert torch.equal(outcome.loss, alone.loss) and torch.equal(outcome.weight, alone.weight)


def test_an_objective_that_computes_another_loss_gets_its_own_back() -> None:
    class Nested(OfToken):
        def terms(self, tokens: TokenBatch) -> Terms:
            with torch.no_grad():
                CALLS["hidden"](OfSequence())
            return super().terms(tokens)

    assert torch.equal(CALLS["hidden"](Nested())[0], CALLS["hidden"](OfToken())[0])
    assert objectives._OWN.get(None) is None, "nothing is kept"
