"""Responses of vLLM's HTTP server, as parsed JSON and as the objects of the OpenAI client."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from server import Server, serve
from test_outputs import NOISE
from tiny import Tiny, difference, facts

from gspo_kernels import Rollouts, from_vllm

pytestmark = pytest.mark.plain_memory

COMPLETIONS, CHAT, GENERATE = "/v1/completions", "/v1/chat/completions", "/inference/v1/generate"
ENDPOINTS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT, GENERATE], ids=lambda path: path.split("/")[2])
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[Server]:
    with serve(tiny) as running:
        yield running


def body(tiny: Tiny, path: str, n: int = 2, max_tokens: int = 6, **more: Any) -> dict[str, Any]:
    """A request for token ids and log-probabilities; that for completions has two prompts."""
    if path == GENERATE:
        parameters = {"n": n, "max_tokens": max_tokens, "logprobs": 0, "seed": 0} | more
        return {"token_ids": tiny.prompts[0], "sampling_params": parameters, "return_token_ids": True}
    what = {"prompt": tiny.prompts[:2], "logprobs": 0} if path == COMPLETIONS else {"messages": MESSAGES}
    return {"n": n, "max_tokens": max_tokens, "logprobs": True, "return_token_ids": True} | what | more


def prompts_of(tiny: Tiny, path: str) -> list[list[int]]:
    return tiny.prompts[:2] if path == COMPLETIONS else tiny.encode(["hello:"]) if path == CHAT else tiny.prompts[:1]


def check(tiny: Tiny, path: str, rollouts: Rollouts, n: int = 2) -> None:
    prompts = [prompt for prompt in prompts_of(tiny, path) for _ in range(n)]
    assert facts(tiny, rollouts)["prompts"] == prompts
    assert difference(tiny, rollouts) < NOISE


def name(path: str) -> str:
    return "server_" + path.split("/")[-1].replace("completions", "completions" if path == COMPLETIONS else "chat")


@ENDPOINTS
def test_json(tiny: Tiny, server: Server, record: Any, path: str) -> None:
    request = body(tiny, path)
    response = server.post(path, **request)
    rollouts = from_vllm(response)
    check(tiny, path, rollouts)
    assert rollouts.token_ids.tolist() == [token for x in response["choices"] for token in x["token_ids"]]
    assert rollouts.finish_reasons == tuple(x["finish_reason"] for x in response["choices"])
    record(name(path), [response], request=request, **facts(tiny, rollouts))


@ENDPOINTS
def test_stop_strings(tiny: Tiny, server: Server, path: str) -> None:
    more = {"stop": [" ", "x", "h", "y"], "include_stop_str_in_output": path == CHAT}
    rollouts = from_vllm(server.post(path, **body(tiny, path, n=4, max_tokens=24, **more)))
    check(tiny, path, rollouts, n=4)
    assert "stop" in rollouts.finish_reasons


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_tokens_named_by_their_ids(tiny: Tiny, server: Server, record: Any, path: str) -> None:
    """Without `return_token_ids` the prompts come from the caller: of several prompts, n choices each."""
    request = body(tiny, path, return_token_ids=False, return_tokens_as_token_ids=True)
    response, prompts = server.post(path, **request), prompts_of(tiny, path)
    rollouts = from_vllm(response, prompt_ids=[prompts if path == COMPLETIONS else prompts[0]])
    check(tiny, path, rollouts)
    record(name(path) + "_names", [response], request=request, given_prompts=prompts, **facts(tiny, rollouts))


def test_the_likeliest_tokens_too(tiny: Tiny, server: Server) -> None:
    for path, more in ((COMPLETIONS, {"logprobs": 3}), (CHAT, {"top_logprobs": 3}), (GENERATE, {"logprobs": 3})):
        check(tiny, path, from_vllm(server.post(path, **body(tiny, path, **more))))


def test_text_mode(tiny: Tiny, server: Server, record: Any) -> None:
    """/inference/v1/generate with the texts of the tokens."""
    request = body(tiny, GENERATE) | {"output_mode": "text"}
    response = server.post(GENERATE, **request)
    rollouts = from_vllm(response)
    check(tiny, GENERATE, rollouts)
    record("server_generate_text", [response], request=request, **facts(tiny, rollouts))


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_the_client(tiny: Tiny, server: Server, record: Any, path: str) -> None:
    request = body(tiny, path)
    known = {key: value for key, value in request.items() if key != "return_token_ids"}
    response = create(server, path)(**known, model="tiny", seed=0, extra_body={"return_token_ids": True})
    rollouts = from_vllm(response)
    check(tiny, path, rollouts)
    record(name(path) + "_client", [response], request=request, **facts(tiny, rollouts))


def create(server: Server, path: str) -> Any:
    from openai import OpenAI

    client = OpenAI(base_url=f"{server.address}/v1", api_key="none")
    return client.completions.create if path == COMPLETIONS else client.chat.completions.create


@pytest.mark.parametrize("usage", [False, True], ids=["plain", "usage"])
@ENDPOINTS
def test_streams(tiny: Tiny, server: Server, record: Any, path: str, usage: bool) -> None:
    """Every chunk with tokens is refused, the last one too, which has a finish reason."""
    request = body(tiny, path, n=1) | ({"prompt": tiny.prompts[0]} if path == COMPLETIONS else {})
    if usage:
        request["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    chunks = [chunk for chunk in server.stream(path, **request) if chunk["choices"]]
    assert len(chunks) > 2 and chunks[-1]["choices"][0]["finish_reason"] == "length"
    for chunk in chunks:
        with pytest.raises((TypeError, ValueError), match=r"stream|logprobs"):
            from_vllm(chunk)
    with pytest.raises(ValueError, match="part"):
        from_vllm(chunks[-1])
    record(
        name(path) + "_chunks" + ("_usage" if usage else ""), chunks, request=request, refused=list(range(len(chunks)))
    )


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT], ids=["completions", "chat"])
def test_streams_of_the_client(tiny: Tiny, server: Server, record: Any, path: str) -> None:
    request = {key: value for key, value in body(tiny, path, n=1).items() if key != "return_token_ids"}
    request |= {"prompt": tiny.prompts[0]} if path == COMPLETIONS else {}
    options = {"model": "tiny", "seed": 0, "stream": True, "extra_body": {"return_token_ids": True}}
    chunks = [chunk for chunk in create(server, path)(**request, **options) if chunk.choices]
    with pytest.raises(ValueError, match="part"):
        from_vllm(chunks[-1])
    record(name(path) + "_client_chunks", chunks, request=request, refused=[len(chunks) - 1])


@ENDPOINTS
def test_aborted(tiny: Tiny, server: Server, record: Any, path: str) -> None:
    """/pause?mode=abort, which trainers send before they push weights: the responses have the tokens so far."""
    request = body(tiny, path, n=1, max_tokens=400, ignore_eos=True)
    request |= {"prompt": tiny.prompts[0]} if path == COMPLETIONS else {}
    before = server.metric("generation_tokens_total")
    with ThreadPoolExecutor() as pool:
        pending = pool.submit(server.post, path, **request)
        while server.metric("generation_tokens_total") < before + 2 and not pending.done():
            time.sleep(0.01)
        server.post("/pause?mode=abort")
        response = pending.result()
        server.post("/resume")
    rollouts = from_vllm(response)
    assert rollouts.finish_reasons == ("abort",) and 0 < rollouts.token_ids.numel() < 400
    assert difference(tiny, rollouts) < NOISE
    record(name(path) + "_aborted", [response], request=request, **facts(tiny, rollouts))


def test_refused(tiny: Tiny, server: Server) -> None:
    for path, more, said in (
        (COMPLETIONS, {"logprobs": None}, "logprobs"),
        (CHAT, {"logprobs": False}, "logprobs"),
        (GENERATE, {"logprobs": None}, "logprobs"),
        (COMPLETIONS, {"return_token_ids": False}, "return_token_ids"),
        (CHAT, {"return_token_ids": False}, "return_token_ids"),
        (COMPLETIONS, {"echo": True}, "echo"),
    ):
        response = server.post(path, **body(tiny, path, **more))
        with pytest.raises(ValueError, match=said):
            from_vllm(response)
