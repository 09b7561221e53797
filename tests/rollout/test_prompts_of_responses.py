"""`prompt_ids` of responses to several prompts: each choice gets its own prompt, or the call is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from modes import DEFAULT_MODE
from test_engines import (
    FLAT,
    PROMPTS,
    as_objects,
    chat_json,
    check,
    completion_json,
    generate_json,
    request_outputs,
)
from test_errors import check_message

from gspo_kernels import from_sglang, from_vllm

pytestmark = DEFAULT_MODE


def joined(ids: bool = False) -> dict[str, Any]:
    """POST /v1/completions with two prompts and n=2: choices of the first prompt, then of the second."""
    first, second = (completion_json(k, ids=ids, as_ids=True) for k in range(2))
    choices = [choice | {"index": i} for i, choice in enumerate(first["choices"] + second["choices"])]
    usage = {name: first["usage"][name] + second["usage"][name] for name in first["usage"]}
    return first | {"choices": choices, "usage": usage}


@pytest.mark.parametrize("read", [lambda x: x, as_objects], ids=["json", "objects"])
def test_each_choice_gets_its_prompt(read: Callable[[Any], Any]) -> None:
    check(from_vllm(read(joined()), prompt_ids=[PROMPTS]))
    check(from_vllm(read(joined(ids=True))))
    check(from_vllm(read(joined(ids=True)), prompt_ids=[PROMPTS]))
    check(from_vllm(read(joined())), prompts=False)


def test_beside_responses_to_one_prompt() -> None:
    """In any container of ids, also with a list around the only prompt."""
    alone = completion_json(0, ids=False, as_ids=True)
    for prompts in (
        [PROMPTS, PROMPTS[0]],
        [PROMPTS, [PROMPTS[0]]],
        [[np.array(p) for p in PROMPTS], torch.tensor(PROMPTS[0])],
    ):
        found = from_vllm([joined(), alone], prompt_ids=prompts)  # type: ignore[arg-type]
        assert found.group_ids is not None and found.group_ids.tolist() == [0, 0, 1, 1, 0, 0]


def test_choices_in_another_order() -> None:
    """`index` counts prompts times n."""
    response = joined()
    response["choices"] = [response["choices"][i] for i in (2, 0, 3, 1)]
    found = from_vllm(response, prompt_ids=[PROMPTS])
    assert found.group_ids is not None and found.group_ids.tolist() == [0, 1, 0, 1]
    assert found.prompt_ids is not None and found.prompt_ids.tolist() == [8, 9, 5, 6, 7, 8, 9, 5, 6, 7]
    for choice in response["choices"]:
        del choice["index"]
    assert from_vllm(response, prompt_ids=[PROMPTS]).finish_reasons == ("abort", "stop", "length", "length")


def without(response: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name not in names}


REFUSED: dict[str, tuple[Callable[[], object], str, str]] = {
    "one prompt for two": (lambda: from_vllm(joined(), prompt_ids=PROMPTS[:1]), "prompt_ids[0]", "got 3"),
    "a flat list for two": (lambda: from_vllm(joined(), prompt_ids=PROMPTS), "prompt_ids", "got 2"),
    "another prompt": (lambda: from_vllm(joined(), prompt_ids=[[[1], [2]]]), "prompt_ids[0]", "got 2"),
    "another prompt than returned": (
        lambda: from_vllm(joined(ids=True), prompt_ids=[PROMPTS[::-1]]), "prompt_ids", "another",
    ),
    "three for four choices": (
        lambda: from_vllm(joined(), prompt_ids=[[[5], [6, 7], [8, 9]]]), "prompt_ids[0]", "3 prompts",
    ),
    "a choice twice": (
        lambda: from_vllm(
            {"choices": [joined()["choices"][i] for i in (0, 0, 2, 3)]}, prompt_ids=[PROMPTS]
        ),
        "prompt_ids[0]", "[0, 0, 2, 3]",
    ),
    "of a chat": (
        lambda: from_vllm(without(chat_json(0, ids=False, as_ids=True), "usage"), prompt_ids=[PROMPTS]),
        "prompt_ids[0]", "got 2",
    ),
    "of a RequestOutput": (
        lambda: from_vllm(request_outputs()[:1], prompt_ids=[PROMPTS]), "prompt_ids[0]", "got 2",
    ),
    "of SGLang": (lambda: from_sglang(generate_json(0, 0), prompt_ids=[PROMPTS]), "prompt_ids[0]", "got 2"),
    "of a chat, by its length": (
        lambda: from_vllm(chat_json(0, ids=False, as_ids=True), prompt_ids=[[5, 6]]), "prompt_ids[0]", "got 2",
    ),
    "of SGLang, by its length": (
        lambda: from_sglang([generate_json(k, j) for k, j in FLAT], prompt_ids=[PROMPTS[k] for _, k in FLAT]),
        "prompt_ids", "outputs[1]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_could_be_assigned_wrongly_is_refused(case: str) -> None:
    call, argument, came = REFUSED[case]
    with pytest.raises(ValueError) as error:
        call()
    check_message(error.value, argument, came)


def test_ids_in_several_prompts_are_named() -> None:
    with pytest.raises(TypeError) as error:
        from_vllm(joined(), prompt_ids=[[[5, 6, 7], [8, "x"]]])  # type: ignore[list-item]
    check_message(error.value, "prompt_ids[0][1][1]", "'x'")


def test_what_llm_generate_takes_is_no_list_of_ids() -> None:
    requests: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    with pytest.raises(TypeError) as error:
        from_vllm(request_outputs(), prompt_ids=requests)
    check_message(error.value, "prompt_ids[0]", "a dict with 'prompt_token_ids'")
