"""`python -m gspo_kernels plan`: what it prints and what it refuses. Nothing of the planned size is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels.__main__ import main
from gspo_kernels.planning import command

pytestmark = DEFAULT_MODE

HEAD = ["--vocab", "151936", "--hidden", "4096", "--dtype", "bf16"]
GPU = ["plan", "--tokens", "32768", *HEAD, "--device", "cuda", "--memory", "80GB"]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def numbers(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(printed(capsys, *arguments, "--json"))
    return found


def test_the_page_has_what_it_prints(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_here", lambda: "cpu")
    found = printed(capsys, *GPU, "--active", "0.5", "--kept", "8")
    assert f"{found.rstrip()}\n```" in PAGE.read_text()
    assert all(line == line.rstrip() and len(line) <= 120 for line in found.splitlines())


def test_json_has_the_numbers_of_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    found = numbers(capsys, *GPU, "--kept", "8")
    assert (found["tokens"], found["responses"], found["memory"]) == (32_768, 32, 80 * 10**9)
    ways = {way["name"]: way for way in found["ways"]}
    plain, hidden, kept = (ways[x] for x in ("plain torch", "from hidden states", "kept sets, from hidden states"))
    assert plain["peak"] == 3 * 4 * 32_768 * 151_936 and plain["products"] == 3
    assert kept["peak"] < hidden["peak"] < ways["from logits, overwrite_logits=True"]["peak"] < plain["peak"]
    assert kept["longest_batch"] > hidden["longest_batch"] > plain["longest_batch"] > 32_768
    assert all(sum(way["held"].values()) == way["peak"] and way["longest_batch"] % 1_024 == 0 for way in ways.values())
    assert hidden["operations"] == 3 * 2 * 32_768 * 151_936 * 4_096


def test_what_the_options_do(capsys: pytest.CaptureFixture[str]) -> None:
    def hidden(*options: str) -> dict[str, Any]:
        return {way["name"]: way for way in numbers(capsys, *GPU, *options)["ways"]}["from hidden states"]

    usual = hidden()
    assert hidden("--masked", "0.25")["products"] == 3 * 0.75
    assert hidden("--active", "0.25", "--skip-zero-advantage")["products"] == 3 * 0.25
    assert hidden("--frozen-head")["products"] == 2
    assert hidden("--length", "8192")["products"] == 4 > hidden("--length", "8192", "--on-policy")["products"]
    assert hidden("--length", "8192", "--objective", "grpo")["products"] == 3
    assert hidden("--length", "8192")["peak"] >= usual["peak"] > hidden("--chunk-bytes", "400000000")["peak"]
    assert hidden("--tp", "8")["operations"] == usual["operations"] / 8
    assert hidden("--reserved", "40GB")["longest_batch"] < usual["longest_batch"]


def test_advice_on_chunks_avoids_the_second_product(capsys: pytest.CaptureFixture[str]) -> None:
    long = [*GPU, "--length", "8192"]
    advice = printed(capsys, *long).split("chunk_bytes=")[1].split(")")[0]
    assert "are computed twice" not in " ".join(printed(capsys, *long, "--chunk-bytes", advice).split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--active", "0"], "argument --active: expected a share above 0, at most 1; got '0'"),
        (["--active", "1.5"], "argument --active: expected a share above 0, at most 1; got '1.5'"),
        (["--masked", "1"], "argument --masked: expected a share from 0 to less than 1; got '1'"),
        (["--kept", "0"], "argument --kept: expected a whole number above 0; got '0'"),
        (["--kept", "200000"], "--kept: expected at most 151,936, the columns that there are; got 200,000"),
        (["--sequences", "40000"], "--sequences: expected at most 32,768, one for each token; got 40,000"),
        (["--tp", "151937"], "--tp: expected at most 151,936 ranks, one for each row of the head; got 151,937"),
        (["--memory", "80"], "argument --memory: expected a number and a unit, such as 80GB (80 x 10^9 bytes)"),
        (["--memory", "1GB"], "for the head (1.24 GB) and what is reserved (0 B); got 1 GB, 245 MB too little"),
        (["--reserved", "79GB"], "got 80 GB, 245 MB too little"),
        (["--chunk-bytes", "1000"], "chunk_bytes: expected at least 607744, one row of 151936 logits"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--length", "10", "--sequences", "10"], "not allowed with argument"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_what_it_refuses(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([*GPU, *options])
    except SystemExit as stopped:  # argparse's
        code = stopped.code
    assert code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "bytes"), [("80GB", 80 * 10**9), ("80GiB", 80 << 30), ("1.5 gb", 1_500_000_000), ("512MiB", 512 << 20)]
)
def test_sizes(text: str, bytes: int) -> None:
    assert command.memory_size(text) == bytes


def test_every_objective_can_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for name in command.OBJECTIVES:
        assert numbers(capsys, *GPU, "--objective", name)["ways"]


def test_what_is_here_is_the_default(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_here", lambda: "cpu")
    found = printed(capsys, "plan", "--tokens", "4000", *HEAD)
    assert "planned for cpu, because no GPU is here (--device cuda plans for one); memory of " in found
    assert "32 responses of 125" in found and "assumed" not in found
    assert "memory of 80 GB (assumed)" in printed(capsys, "plan", "--tokens", "4000", *HEAD, "--device", "cuda")


def test_nothing_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        assert main([*GPU, "--kept", "8"]) == 0
        assert main([*GPU[:-4], "--device", "cpu"]) == 0
    assert profile.profiler is not None
    sizes = [x.nbytes() for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    assert max(sizes, default=0) < 1 << 20
