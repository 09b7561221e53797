"""`help` of a public function shows its whole signature and explains each argument once."""

from __future__ import annotations

import inspect
import pickle
import pydoc
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gspo_kernels
from gspo_kernels.base.documentation import documented_arguments, with_arguments_of
from gspo_kernels.linear.from_hidden import LinearLossOptions
from gspo_kernels.losses.from_logits import LossOptions

FROM_LOGITS = ("gspo_loss", "gspo_token_loss", "grpo_loss", "ppo_loss")
FROM_HIDDEN = tuple(f"linear_{name}" for name in FROM_LOGITS)
OTHERS = ("policy_loss", "linear_policy_loss", "policy_loss_from_logprobs", "token_logprobs", "linear_token_logprobs")
GROUPS = {
    "mask": "the batch", "temperature": "the batch", "beta": "KL and entropy", "aggregation": "objective and reduction",
    "tp_group": "parallel", "vocab_size": "parallel", "backend": "memory and backend", "chunk_bytes":
    "memory and backend", "eps_low": "clip range", "bias": "the batch",
}  # fmt: skip


@pytest.mark.parametrize("name", FROM_LOGITS + FROM_HIDDEN + OTHERS)
def test_help_explains_every_argument_once(name: str) -> None:
    function = getattr(gspo_kernels, name)
    parameters = inspect.signature(function).parameters
    assert all(p.kind != p.VAR_KEYWORD for p in parameters.values()), "options have names"
    text = pydoc.plain(pydoc.render_doc(function))
    for argument in parameters:
        assert f"{argument}: '" in text.split("\n    ")[0], f"{argument} is not in the signature"
        entries = re.findall(rf"^        (?:\w+, )*{argument}(?:, \w+)*: ", text, re.MULTILINE)
        assert len(entries) == 1, f"{argument} is explained {len(entries)} times"
    groups = documented_arguments(function.__doc__)
    assert groups.keys() == parameters.keys()
    assert {k: v for k, v in groups.items() if k in GROUPS} == {k: v for k, v in GROUPS.items() if k in groups}


@pytest.mark.parametrize(("names", "general", "options"), [
    (FROM_LOGITS, "policy_loss", LossOptions), (FROM_HIDDEN, "linear_policy_loss", LinearLossOptions),
])  # fmt: skip
def test_a_named_loss_takes_what_the_general_one_takes(names: tuple[str, ...], general: str, options: Any) -> None:
    parameters = inspect.signature(getattr(gspo_kernels, general)).parameters
    passed_on = {name for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY} - {"objective"}
    assert set(typing.get_type_hints(options)) == passed_on
    for name in names:
        function = getattr(gspo_kernels, name)
        own = inspect.signature(function).parameters
        assert set(own) == (set(parameters) - {"objective"}) | {"eps_low", "eps_high", "dual_clip"}
        assert all(own[p].default is parameters[p].default for p in passed_on)
        assert function.__annotations__["options"].startswith("Unpack["), "typed callers see each option"
        assert pickle.loads(pickle.dumps(function)) is function


def test_a_named_loss_compiles_without_a_graph_break() -> None:
    logits = torch.zeros(1, 2, 5, requires_grad=True)
    given = logits, torch.zeros(1, 2, dtype=torch.int64), torch.ones(1)

    def loss(*arguments: Any) -> torch.Tensor:
        return gspo_kernels.gspo_loss(*arguments, eps_low=0.1, beta=0.0).loss

    assert torch.equal(torch.compile(loss, fullgraph=True, backend="eager")(*given), loss(*given))


def general(values: int, *, objective: str = "o", first: int = 1, second: int = 2, third: int = 3) -> None:
    """General.

    Args: numbers
        values: several.
        first: of two
            lines.
        second, third: both.

    Args: more
        objective: left out.

    Returns: nothing.
    """


def named(values: int, *, own: int = 0, **options: Any) -> None:
    """Named.

    Args: numbers
        values: others.

    The end.
    """


def test_groups_are_merged() -> None:
    decorated: Callable[..., None] = with_arguments_of(general, "\nArgs: extra\n    own: its own.")(named)
    assert str(inspect.signature(decorated)).replace("'", "") == (
        "(values: int, *, own: int = 0, first: int = 1, second: int = 2, third: int = 3) -> None"
    )
    assert (
        decorated.__doc__
        == inspect.cleandoc(
            """Named.

        Args: extra
            own: its own.

        Args: numbers
            values: others.
            first: of two
                lines.
            second, third: both.

        The end.
        """
        )
        + "\n"
    )
