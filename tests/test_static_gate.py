"""The static gate reads machine code as it should: listings made up here, good and bad. It compiles nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from modes import DEFAULT_MODE

from benchmarks import static_gate
from benchmarks.static_gate import Figures, Hot

pytestmark = DEFAULT_MODE

COLUMNS = 8  # a thread and iteration of the loops below: one 16-byte access to bf16
READ = ["LDG.E.128 R4, [R2.64]", *["MUFU.EX2 R8, R8"] * 9, *["FFMA R8, R4, R5, R6"] * 30]
WRITE = [*READ[:1], *["MUFU.EX2 R8, R8"] * 8, *["FFMA R8, R4, R5, R6"] * 30, "STG.E.128 [R2.64], R4"]


def listing(*parts: Iterable[str]) -> str:
    """As nvdisasm prints it; a part that ends in ":" is a label."""
    lines = ["kernel:", ".text.kernel:"]
    for at, line in enumerate(line for part in parts for line in part):
        guard, _, rest = line.partition(" ") if line.startswith("@") else ("", "", line)
        lines.append(line if line.endswith(":") else f"        /*{at * 16:04x}*/  {guard:>12} {rest} ;")
    return "\n".join(lines)


def loop(body: list[str], label: str = ".L_x_1") -> list[str]:
    return [f"{label}:", *body, f"@P0 BRA `({label})"]


def problems(*parts: Iterable[str], kind: str = "read", ptx: str = "fma.rn.f32") -> str:
    return "; ".join(static_gate.read_sass(listing(*parts), ptx, [kind], "bf16", COLUMNS)[1])


def replaced(body: list[str], old: str, new: str) -> list[str]:
    return [line.replace(old, new) for line in body]


def test_instructions_are_taken_apart() -> None:
    instructions, labels = static_gate.parse(
        listing(
            ["MOV R1, c[0x0][0x28]", ".L_x_12:", "@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x800]", "@!UP1 UIADD3 UR4, UR4"]
        )
    )
    assert labels == {".L_x_12": 1}
    assert [(i.guard, i.base) for i in instructions] == [("", "MOV"), ("@!P0", "LDG"), ("@!UP1", "UIADD3")]
    assert str(instructions[1]) == "@!P0 LDG.E.128 R4, desc[UR4][R2.64+0x800]"


@pytest.mark.parametrize(
    ("opcode", "size"), [("LDG.E.U16", 2), ("LDG.E", 4), ("LDG.E.64", 8), ("LDG.E.128", 16), ("STG.E.ENL2.256", 32)]
)
def test_the_size_of_an_access(opcode: str, size: int) -> None:
    assert static_gate.Instruction("", opcode, "").bytes == size


def test_figures_of_a_good_loop() -> None:
    masked = replaced([*READ, *["ISETP.GE.AND P1, PT, R4, R5, PT"] * 30], "LDG", "@P1 LDG")
    text = listing(["MOV R1, R2"], loop(READ), loop(masked, ".L_x_2"), [".L_x_3:", "BRA `(.L_x_3)"])
    hot, wrong = static_gate.read_sass(text, "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert (hot, wrong) == ({"read": Hot(5.125, 1.125, 8)}, [])
    assert not problems(loop(WRITE), kind="write")


def test_an_unrolled_loop_has_more_columns() -> None:
    hot, _ = static_gate.read_sass(listing(loop(READ * 3)), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].elements == 3 * COLUMNS


def test_a_shifted_row_is_read_twice() -> None:
    shifted = [READ[0], *READ]
    hot, wrong = static_gate.read_sass(
        listing(loop(READ), loop(shifted, ".L_x_2")), "fma.rn.f32", ["read", "shifted"], "bf16", COLUMNS
    )
    assert not wrong
    assert (hot["read"].instructions, hot["shifted"].instructions) == (5.125, 5.25)
    assert "no read loop" in problems(loop(shifted))


def test_of_several_paths_the_plain_one_counts() -> None:
    """A block without the target jumps over what the target needs."""
    extra = ["@!P1 BRA `(.L_x_2)", *["FSEL R4, R5, R6, P2"] * 50, ".L_x_2:"]
    hot, _ = static_gate.read_sass(listing(loop([*READ, *extra])), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].instructions == 42 / COLUMNS


def test_a_path_that_skips_the_work_does_not_count() -> None:
    body = ["@!P1 BRA `(.L_x_2)", *READ, ".L_x_2:", "IADD3 R1, R1, 0x1, RZ"]
    hot, _ = static_gate.read_sass(listing(loop(body)), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].instructions == 43 / COLUMNS


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (["LDG.E.U16 R4, [R2.64]"] * 8 + READ[1:], "read", "8 accesses of less than 16 bytes"),
        (["LDG.E.64 R4, [R2.64]"] * 2 + READ[1:], "read", "2 accesses of less than 16 bytes"),
        (WRITE[:-1] + ["STG.E.U16 [R2.64], R4"] * 8, "write", "8 accesses of less than 16 bytes"),
        ([*READ, "SHFL.BFLY PT, R4, R5, 0x10, 0x1f"], "read", "lanes exchange data"),
        ([*READ, "BAR.SYNC.DEFER_BLOCKING 0x0"], "read", "lanes exchange data"),
        ([*READ, "LDL R4, [R1]"], "read", "spills"),
        ([*READ, "STL.64 [R1], R4"], "read", "spills"),
        ([*READ, *["FADD R4, R5, R6"] * 24], "read", "8.125 instructions a column > 8 (30 FFMA, 24 FADD"),
        ([*WRITE, *["FADD R4, R5, R6"] * 17], "write", "7.25 instructions a column > 7"),
        (replaced(READ, "FFMA", "FMUL"), "read", "no fused multiply-add"),
        (replaced(READ, "LDG", "@P1 LDG"), "read", "no read loop over whole blocks"),
        (["IADD3 R1, R1, 0x1, RZ"], "read", "no read loop over whole blocks"),
    ],
)
def test_a_bad_loop_is_refused(body: list[str], kind: str, said: str) -> None:
    assert said in problems(loop(body), kind=kind)


def test_spills_outside_of_the_loop_are_refused() -> None:
    assert "1 accesses to local memory" in problems(["STL [R1], R4"], loop(READ))


def test_float64_and_lost_fusion_are_refused() -> None:
    assert "float64 in the PTX: cvt.f64.f32" in problems(loop(READ), ptx="fma.rn.f32\n\tcvt.f64.f32 %fd1, %f1;")
    assert "no fma in the PTX" in problems(loop(READ), ptx="mul.f32")


GOOD = Figures(96, 16, {"read": Hot(7.5, 1.031, 32)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: dataclasses.replace(f, registers=105), "105 registers; committed 96"),
        (lambda f: dataclasses.replace(f, loops={"read": Hot(7.73, 1.031, 32)}), "7.73 instructions a column"),
        (lambda f: dataclasses.replace(f, loops={"read": Hot(7.5, 1.062, 32)}), "1.062 MUFU a column"),
        (lambda f: dataclasses.replace(f, wide_accesses=0), "no accesses of 16 bytes; committed 4"),
    ],
)
def test_regressions(change: Callable[[Figures], Figures], said: str) -> None:
    then = dataclasses.replace(GOOD, wide_accesses=4)
    assert static_gate.judge({"kernel": then}, {"kernel": then}) == []
    assert said in "; ".join(static_gate.judge({"kernel": change(then)}, {"kernel": then}))


def test_small_changes_pass() -> None:
    near = Figures(104, 16, {"read": Hot(7.72, 1.031, 32)})
    assert static_gate.judge({"kernel": near}, {"kernel": GOOD}) == []


def test_another_triton_is_held_to_the_budgets_alone() -> None:
    worse = Figures(200, 16, {"read": Hot(7.9, 1.2, 32)})
    assert static_gate.judge({"kernel": worse}, None) == []
    spilling = dataclasses.replace(worse, problems=("2 accesses to local memory: spills",))
    assert static_gate.judge({"kernel": spilling}, None) == ["kernel: 2 accesses to local memory: spills"]


def test_a_new_kernel_wants_figures() -> None:
    assert "add it by --write" in static_gate.judge({"new": GOOD}, {"kernel": GOOD})[0]


def test_the_committed_figures_name_every_kernel_and_keep_the_budgets() -> None:
    _, committed = static_gate.load()
    assert list(committed) == [job.name for job in static_gate.jobs()]
    for job in static_gate.jobs():
        hot = committed[job.name].loops
        assert set(hot) == (set(job.variant.loops) if job.target in static_gate.NVIDIA else set())
        for kind, figures in hot.items():
            assert figures.instructions <= static_gate.budget(kind, job.dtype)


def test_the_readme_has_the_committed_figures() -> None:
    readme = (static_gate.REPOSITORY / "README.md").read_text()
    assert static_gate.markdown() in readme, "python -m benchmarks.static_gate --markdown prints its table"


def test_figures_are_read_as_they_are_written(tmp_path: Path) -> None:
    figures = {"one": GOOD, "two": Figures(8, 0, wide_accesses=3)}
    static_gate.save("1.2.3", figures, tmp_path / "static.json")
    assert static_gate.load(tmp_path / "static.json") == ("1.2.3", figures)
