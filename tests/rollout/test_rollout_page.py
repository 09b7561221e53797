"""docs/rollout.md: its examples run against a tiny model and what an engine with its weights would return."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import CompletionOutput, RequestOutput, as_dicts

import gspo_kernels

pytestmark = [
    DEFAULT_MODE,
    pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers: make demo"),
]
PAGE = Path(__file__).parents[2] / "docs" / "rollout.md"
SECTIONS = ("From an engine to a loss", "How responses ended", "Weights that change while an engine samples")


def blocks_of(section: str) -> list[str]:
    text = re.split(rf"^#+ {section}\n", PAGE.read_text(), flags=re.MULTILINE)[1]
    text = re.split(r"^#+ [A-Z]", text, flags=re.MULTILINE)[
        0
    ]  # to the next heading; comments of code are in lower case
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def tiny_model() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


class LLM:
    """Random responses, with the model's own log-probabilities of each sequence alone."""

    def __init__(self, model: Any) -> None:
        self.model, self.generator = model, torch.Generator().manual_seed(0)

    @torch.no_grad()
    def generate(self, prompts: list[list[int]], parameters: SimpleNamespace) -> list[RequestOutput]:
        return [
            RequestOutput("", None, prompt, None, [self.respond(prompt, j) for j in range(parameters.n)], True)
            for prompt in prompts
        ]

    def respond(self, prompt: list[int], j: int) -> CompletionOutput:
        tokens = torch.randint(0, 50, (3 + j,), generator=self.generator).tolist()
        logits = self.model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].tolist()
        found = CompletionOutput(
            j, "", tokens, sum(logprobs), as_dicts(tokens, logprobs), "abort" if j == 7 else "stop"
        )
        half = {"version": "1", "start": 0, "end": 2}, {"version": "2", "start": 2, "end": len(tokens)}
        found.weight_versions = list(half)  # type: ignore[attr-defined]
        return found


def test_the_examples_run_and_the_engines_ratios_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, logged = tiny_model(), dict[str, Any]()
    names: dict[str, Any] = vars(gspo_kernels) | {
        "__name__": "example", "torch": torch, "model": model, "llm": LLM(model), "prompts": [[1, 2], [3, 4, 5]],
        "SamplingParams": SimpleNamespace, "score": lambda response: float(response.token_ids[0] % 2),
        "optimizer": torch.optim.SGD(model.parameters(), lr=1e-2), "step": 3, "log": logged.update,
    }  # fmt: skip
    first, *later = [block for section in SECTIONS for block in blocks_of(section)]
    assert len(later) == 2
    code = compile(first, f"{PAGE.name}, first example", "exec", dont_inherit=True)
    before = [parameter.clone() for parameter in model.parameters()]
    ratios = list[float]()
    loss = gspo_kernels.gspo_loss

    def watched(*arguments: Any, **options: Any) -> Any:
        found = loss(*arguments, **options)
        ratios.append(float(found.stats.ratio_mean))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(gspo_kernels, "gspo_loss", watched)  # the example imports it
        exec(code, names)
    assert len(ratios) == 4 and ratios[0] == pytest.approx(1, abs=1e-6)
    assert all(abs(ratio - 1) > 1e-6 for ratio in ratios[1:]), "the weights have moved"
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    for block in later:
        exec(compile(block, PAGE.name, "exec", dont_inherit=True), names)
    assert len(names["batch"]) == 14 == len(names["advantages"]), "one of eight was aborted, in each group"
    assert {name.split("/")[1] for name in logged} == {"age_1", "age_2"}
