"""`python -m gspo_kernels`: one value, printed as text or JSON; exit codes; nothing private."""

from __future__ import annotations

import argparse
import dataclasses
import getpass
import json
import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import doctor_page  # docs/scripts/doctor_page.py
import pytest
import torch
from modes import DEFAULT_MODE

from gspo_kernels.__main__ import main
from gspo_kernels.doctor import checks, command, environment, speed, text
from gspo_kernels.doctor.findings import Findings, as_json, without_names
from gspo_kernels.doctor.oracle import Sizes
from gspo_kernels.planning import command as planning
from gspo_kernels.rows import cpu_rows, cuda_rows, torch_rows, triton_rows

pytestmark = DEFAULT_MODE
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SIZES", {"cpu": Sizes(vocab=1_003, head_vocab=131, width=16)})
    monkeypatch.setattr(speed, "VOCAB", 1_001)
    monkeypatch.setattr(speed, "MOST_BYTES", {"cpu": 1 << 18})
    monkeypatch.setattr(speed, "ROUNDS", 1)


@pytest.fixture
def findings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Findings]]:
    """Those of each call of `main`."""
    found: list[Findings] = []

    def recorded(**fields: Any) -> Findings:
        found.append(Findings(**fields))
        return found[-1]

    monkeypatch.setattr(command, "Findings", recorded)
    yield found


def test_text_and_json_are_of_one_value(
    findings: list[Findings], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([]) == 0
    printed = capsys.readouterr().out
    (found,) = findings
    assert printed == text.sections(found, 80)
    assert max(map(len, printed.splitlines())) <= 80
    assert [name for name in text.SECTIONS if f"{text.SECTIONS[name][0]}\n" not in printed] in ([], ["advice"])
    fields = [(name, getattr(found, name)) for name in text.SECTIONS]
    monkeypatch.setattr(command, "_examine", lambda **_: iter(fields))
    assert main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == as_json(found) == as_json(findings[1])


KEYS = {
    "": "schema versions processor gpus environment services checks speed advice passed",
    "versions": "gspo_kernels location installation commit python torch torch_build triton trainers system libc",
    "processor": "model architecture cores usable_cores physical_cores threads memory_bytes instruction_sets "
    "torch_capability kernels product_kernels chosen_by huge_pages problem",
    "environment": "name value effect problem",
    "services": "device dtype backends token_stage products problem",
    "checks": "device backend dtype passed measures raised advice",
    "speed": "device vocab timings problem",
}


def test_the_keys_of_the_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs read them: a key that is renamed or removed needs another number of `SCHEMA`."""
    monkeypatch.setenv("GSPO_KERNELS_TEST_ALL", "0")
    assert main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1
    for name, keys in KEYS.items():
        of_name = found[name] if name else found
        assert list(of_name[0] if isinstance(of_name, list) else of_name) == keys.split(), name
    for private in (str(Path.home()), f"/{getpass.getuser()}/", f"/{platform.node()}/"):
        assert private not in json.dumps(found), private
    assert {(each["backend"], each["dtype"]) for each in found["checks"]} >= {
        ("reference", dtype) for dtype in ("fp32", "bf16", "fp16")
    }
    assert {timing["work"] for timing in found["speed"][0]["timings"]} == {"forward", "forward and backward"}


def test_what_is_private_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    monkeypatch.setattr(platform, "node", lambda: "tower-7")
    said = "in /home/ada/src (/scratch/ada/x, /mnt/tower-7), /home/adam, ada.py, /data/adapters; 'file:///home/ada'"
    assert without_names(said) == (
        "in ~/src (/scratch/$USER/x, /mnt/$HOSTNAME), /home/adam, ada.py, /data/adapters; 'file://~'"
    )
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert without_names("/usr/lib") == "/usr/lib"

    def unknown() -> Any:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", unknown)
    assert without_names("/home/ada/src") == "/home/$USER/src"


def test_a_failing_check_is_named_and_decides_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the kernel died\nat line 7")

    monkeypatch.setattr(torch_rows, "backward", broken)
    monkeypatch.setenv("COLUMNS", "100")
    assert main(["--no-speed"]) == 1
    captured = capsys.readouterr()
    assert re.search(r"^  FAIL reference fp32 ", captured.out, re.MULTILINE)
    assert "raised RuntimeError: the kernel died" in captured.out and "issues/new" in captured.out
    assert "Traceback" not in captured.out + captured.err
    assert captured.out.rstrip().splitlines()[-1].startswith("3 of ")
    assert main(["--json", "--no-speed"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is False and found["speed"] == []
    (failed,) = {each["backend"] for each in found["checks"] if not each["passed"]}
    assert failed == "reference"


def test_numbers_that_json_does_not_know(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, findings: list[Findings]
) -> None:
    forward = torch_rows.forward

    def wrong(rows: Any) -> Any:
        stats = forward(rows)
        stats.logprobs.fill_(torch.nan)
        return stats

    monkeypatch.setattr(torch_rows, "forward", wrong)
    assert main(["--json", "--no-speed"]) == 1
    out = capsys.readouterr().out
    assert "NaN" not in re.sub(r'"[^"]*"', "", out)
    measures = {each["name"]: each for each in json.loads(out)["checks"][-1]["measures"]}
    assert measures["log-probability"]["error"] is None and "got nan" in measures["log-probability"]["detail"]
    assert "NaN" in text.sections(findings[0], 100)


def test_without_the_extension_and_without_triton(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_rows, "_VERSION", None)
    monkeypatch.setattr(cpu_rows, "_unavailable_reason", "the C++ extension is not in here")
    monkeypatch.setattr(cuda_rows, "_native", None)
    assert main(["--no-speed"]) == 0
    out = capsys.readouterr().out
    assert "-> reference (plain torch): runs" in out
    assert "native (C++, not installed): the C++ extension is not in here" in out
    assert "triton (Triton, not installed): Triton is not installed" in out
    assert len(re.findall(r"^      pip install .*", out.split("To get more")[1], re.MULTILINE)) == 1
    assert "native fp32" not in out


def test_an_extension_of_another_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an update of a source tree that was not compiled again."""
    monkeypatch.setattr(cpu_rows, "_native", SimpleNamespace())
    monkeypatch.setattr(cpu_rows, "_unavailable_reason", "")
    monkeypatch.setenv("GSPO_KERNELS_ISA", "avx2")
    assert main([]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "compiled from another version of this package" in out and "does not fit this package: pip install" in out
    assert "FAIL native fp32" in out and "raised AttributeError" in out


def test_a_setting_that_is_refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSPO_KERNELS_CPU_PRODUCTS", "fastest")
    assert main(["--no-speed"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "GSPO_KERNELS_CPU_PRODUCTS=fastest: WRONG: expected one of mkl, native, float32; got 'fastest'" in out
    assert "correct or unset the variable that the error names" in out


def test_a_misspelt_variable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning, and no failure."""
    monkeypatch.setenv("GSPO_KERNELS_DEBGU", "1")
    monkeypatch.setenv("GSPO_SOMETHING_ELSE", "1")
    found = {each.name: each for each in environment.environment()}
    assert "GSPO_KERNELS_DEBUG has a similar one" in found["GSPO_KERNELS_DEBGU"].problem
    assert found["GSPO_SOMETHING_ELSE"].problem == "no variable has this name"
    assert main(["--no-speed"]) == 0
    out = capsys.readouterr().out
    assert "GSPO_KERNELS_DEBGU=1: WRONG" in out and "2 environment variables are wrong" in out


def test_variables_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "environment.md").read_text()
    rows = re.findall(r"^\| (`.*?`) \|", page, flags=re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == set(environment.OURS)


def test_commands_and_wrong_usage(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, argparse.Namespace]] = []

    def note(name: str, options: argparse.Namespace) -> int:
        ran.append((name, options))
        return 0

    monkeypatch.setattr(command, "run", lambda options: note("doctor", options))
    monkeypatch.setattr(planning, "run", lambda options: note("plan", options))
    monkeypatch.setattr(planning, "add_arguments", lambda parser: parser.add_argument("--json", action="store_true"))
    calls: list[list[str]] = [[], ["--json"], ["plan"], ["plan", "--json"], ["--json", "plan"]]
    assert [main(call) for call in calls] == [0] * 5
    assert [(name, options.json) for name, options in ran] == [
        ("doctor", False), ("doctor", True), ("plan", False), ("plan", True), ("plan", True),
    ]  # fmt: skip
    for wrong in (["--nothing"], ["nothing"]):
        with pytest.raises(SystemExit) as exit:
            main(wrong)
        assert exit.value.code == 2
    assert "usage: python -m gspo_kernels" in capsys.readouterr().err


def test_every_field_is_shown_or_is_a_detail() -> None:
    """A field of the findings that has no section would be in the JSON alone."""
    names = {field.name for field in dataclasses.fields(Findings)}
    assert names - set(text.SECTIONS) == {"schema", "passed"}


def test_the_page_shows_the_output() -> None:
    """With the sections and columns that it has now, and an explanation of each."""
    page = doctor_page.PAGE.read_text()
    output = page.partition(doctor_page.BEGIN)[2].partition(doctor_page.END)[0]
    explained = page.partition("## How to read it")[2].partition("## Exit codes")[0]
    for title, _ in text.SECTIONS.values():
        assert f"\n{title}\n" in output or title == "To get more", title
        assert f"**{title.partition(',')[0].partition(' of a')[0]}.**" in explained or title == "GPUs", title
    for name in checks.SHOWN.values():
        assert f" {name} " in f"{output} ".replace("\n", " ") and f"`{name}`" in explained, name
    assert doctor_page.with_output(page, output.strip().removeprefix("```text\n").removesuffix("```")) == page


def test_nothing_is_left_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread count and torch's random numbers are those from before."""
    threads, state, variables = torch.get_num_threads(), torch.get_rng_state(), dict(os.environ)
    checks.check(torch.device("cpu"), "reference", "fp32")
    speed.speed(torch.device("cpu"))
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == variables
