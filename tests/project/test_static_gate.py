"""The static gate reads machine code as it should: listings made up here, good and bad. It compiles nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from modes import DEFAULT_MODE

from benchmarks import static_cuda, static_gate, static_sass, static_triton
from benchmarks.static_cuda import Kernel
from benchmarks.static_gate import Measured
from benchmarks.static_sass import ITEM_BYTES, Figures, Hot

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
    return "; ".join(static_triton.read_sass(listing(*parts), ptx, [kind], "bf16", COLUMNS)[1])


def replaced(body: list[str], old: str, new: str) -> list[str]:
    return [line.replace(old, new) for line in body]


def test_instructions_are_taken_apart() -> None:
    instructions, labels = static_sass.parse(
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
    assert static_sass.Instruction("", opcode, "").bytes == size


def test_figures_of_a_good_loop() -> None:
    masked = replaced([*READ, *["ISETP.GE.AND P1, PT, R4, R5, PT"] * 30], "LDG", "@P1 LDG")
    text = listing(["MOV R1, R2"], loop(READ), loop(masked, ".L_x_2"), [".L_x_3:", "BRA `(.L_x_3)"])
    hot, wrong = static_triton.read_sass(text, "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert (hot, wrong) == ({"read": Hot(5.125, 1.125, 8, 9)}, [])
    assert not problems(loop(WRITE), kind="write")


def test_an_unrolled_loop_has_more_columns() -> None:
    hot, _ = static_triton.read_sass(listing(loop(READ * 3)), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].elements == 3 * COLUMNS


def test_a_shifted_row_is_read_twice() -> None:
    shifted = [READ[0], *READ]
    hot, wrong = static_triton.read_sass(
        listing(loop(READ), loop(shifted, ".L_x_2")), "fma.rn.f32", ["read", "shifted"], "bf16", COLUMNS
    )
    assert not wrong
    assert (hot["read"].instructions, hot["shifted"].instructions) == (5.125, 5.25)
    assert "no read loop" in problems(loop(shifted))


def test_of_several_paths_the_plain_one_counts() -> None:
    """A block without the target jumps over what the target needs."""
    extra = ["@!P1 BRA `(.L_x_2)", *["FSEL R4, R5, R6, P2"] * 50, ".L_x_2:"]
    hot, _ = static_triton.read_sass(listing(loop([*READ, *extra])), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].instructions == 42 / COLUMNS


def test_a_path_that_skips_the_work_does_not_count() -> None:
    body = ["@!P1 BRA `(.L_x_2)", *READ, ".L_x_2:", "IADD3 R1, R1, 0x1, RZ"]
    hot, _ = static_triton.read_sass(listing(loop(body)), "fma.rn.f32", ["read"], "bf16", COLUMNS)
    assert hot["read"].instructions == 43 / COLUMNS


@pytest.mark.parametrize(
    ("body", "covered"),
    [
        (["LDG.E.128 R4, [R2.64]", "FFMA R8, R4, R5, R6", *["MUFU.EX2 R8, R8"] * 9], 0),
        (["LDG.E.128 R4, [R2.64]", *["MUFU.EX2 R8, R8"] * 9, "FFMA R8, R9, R7, R6"], 9),  # R7: of the same load
        (["FFMA R8, R4, R5, R6", *["MUFU.EX2 R8, R8"] * 2, "LDG.E.128 R4, [R2.64]", *["MUFU.EX2 R8, R8"] * 7], 7),
        (["MUFU.EX2 R8, R8", "FFMA R8, R4, R5, R6", "LDG.E.128 R4, [R2.64]", *["MUFU.EX2 R8, R8"] * 8], 9),
        (["LDG.E.128 R4, [R2.64]", *["MUFU.EX2 R9, R8"] * 8, "STG.E.128 [R2.64], R4"], 8),
        (["LDG.E.128 R4, [R2.64]", "MUFU.EX2 R9, R8", "LDG.E.128 R12, [R2.64]", *["MUFU.EX2 R9, R8"] * 7], 7),
    ],
)
def test_exponentials_while_loads_are_under_way(body: list[str], covered: int) -> None:
    (found,) = static_sass.find_loops(listing(loop(body)))
    assert found.covered == covered


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


def test_a_kernel_may_be_allowed_a_few_spills_outside_of_loops() -> None:
    def said(*parts: Iterable[str], allowed: int) -> str:
        _, found = static_triton.read_sass(listing(*parts), "fma.rn.f32", ["read"], "bf16", COLUMNS, allowed=allowed)
        return "; ".join(found)

    assert "local memory" not in said(["LDL R4, [R1]"], loop(READ), allowed=1)
    assert "2 accesses to local memory" in said(["LDL R4, [R1]", "STL [R1], R4"], loop(READ), allowed=1)
    assert "1 of them in loops" in said(loop([*READ, "LDL R4, [R1]"]), allowed=99)


def test_float64_and_lost_fusion_are_refused() -> None:
    assert "float64 in the PTX: cvt.f64.f32" in problems(loop(READ), ptx="fma.rn.f32\n\tcvt.f64.f32 %fd1, %f1;")
    assert "no fma in the PTX" in problems(loop(READ), ptx="mul.f32")


GOOD = Figures(96, 16, {"read": Hot(7.5, 1.031, 32, 32)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: dataclasses.replace(f, registers=105), "105 registers; committed 96"),
        (lambda f: dataclasses.replace(f, loops={"read": Hot(7.73, 1.031, 32)}), "7.73 instructions a column"),
        (lambda f: dataclasses.replace(f, loops={"read": Hot(7.5, 1.062, 32)}), "1.062 MUFU a column"),
        (lambda f: dataclasses.replace(f, loops={"read": Hot(7.5, 1.031, 32, 20)}), "20 exponentials while loads are"),
        (lambda f: dataclasses.replace(f, wide_accesses=0), "no accesses of 16 bytes; committed 4"),
    ],
)
def test_regressions(change: Callable[[Figures], Figures], said: str) -> None:
    then = dataclasses.replace(GOOD, wide_accesses=4)
    assert static_gate.judge({"kernel": then}, {"kernel": then}) == []
    assert said in "; ".join(static_gate.judge({"kernel": change(then)}, {"kernel": then}))


def test_small_changes_pass() -> None:
    near = Figures(104, 16, {"read": Hot(7.72, 1.031, 32, 28)})
    assert static_gate.judge({"kernel": near}, {"kernel": GOOD}) == []


def test_another_triton_is_held_to_the_budgets_alone() -> None:
    worse = Figures(200, 16, {"read": Hot(7.9, 1.2, 32)})
    assert static_gate.judge({"kernel": worse}, None) == []
    spilling = dataclasses.replace(worse, problems=("2 accesses to local memory: spills",))
    assert static_gate.judge({"kernel": spilling}, None) == ["kernel: 2 accesses to local memory: spills"]


def test_a_new_kernel_wants_figures() -> None:
    assert "add it by --write" in static_gate.judge({"new": GOOD}, {"kernel": GOOD})[0]


def test_the_committed_figures_name_every_kernel_and_keep_the_budgets() -> None:
    committed = static_gate.load()["Triton"].figures
    assert list(committed) == [job.name for job in static_triton.jobs()]
    for job in static_triton.jobs():
        hot = committed[job.name].loops
        assert set(hot) == (set(job.variant.loops) if job.target in static_sass.NVIDIA else set())
        for kind, figures in hot.items():
            assert figures.instructions <= static_triton.budget(kind, job.dtype, job.variant.capped)


def test_the_page_has_the_committed_figures() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    for table in static_gate.markdown():
        assert table in page, "python -m benchmarks.static_gate --markdown prints its tables"


def test_figures_are_read_as_they_are_written(tmp_path: Path) -> None:
    measured = {"Triton": Measured("1.2.3", {"one": GOOD, "two": Figures(8, 0, wide_accesses=3)})}
    measured["nvcc"] = Measured("13.0", {"three": GOOD})
    static_gate.save(measured, tmp_path / "static.json")
    assert static_gate.load(tmp_path / "static.json") == measured


# ---- CUDA C++: out of shared memory, 32 columns of bf16 a thread and iteration, one look at the maximum

SYMBOL = "_ZN4gspo3gpu8one_readINS0_8BFloat16ENS0_8ResidentELi256EEEvNS0_7OneReadE"
RESIDENT = Kernel("one_read", "Resident", ("copy", "read", "write"), "LDS")
USAGE = {"REG": 64, "STACK": 0, "SHARED": 1536, "LOCAL": 0}
COPY = [*["@!PT LDS RZ, [RZ]"] * 3, *["LDGSTS.E.BYPASS.128 [R23], desc[UR6][R20.64]"] * 4]
SUM = [*["LDS.128 R4, [R2]"] * 4, *["MUFU.EX2 R8, R8"] * 33, *["FFMA R8, R4, R5, R6"] * 100]
GRADIENT = ["LDS.128 R4, [R2]", *["MUFU.EX2 R8, R8"] * 8, *["FFMA R8, R4, R5, R6"] * 20, "STG.E.128 [R2.64], R4"]


def resident(
    copy: list[str] = COPY, read: list[str] = SUM, write: list[str] = GRADIENT, behind: Iterable[str] = ()
) -> str:
    return listing(loop(copy), loop(read, ".L_x_2"), loop(write, ".L_x_3"), behind)


def figures_of(text: str, dtype: str = "bf16", **usage: int) -> Figures:
    return static_cuda.read_kernel(text, {**USAGE, **usage}, RESIDENT, dtype)


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        (SYMBOL, "one_read, Resident 256, bf16, sm_90"),
        ("_ZN4gspo3gpu8one_readIfNS0_5AgainELi1024EEEvNS0_7OneReadE", "one_read, Again 1024, fp32, sm_90"),
        (SYMBOL.replace("ELi256E", "ELi256ENS0_5NoCapE"), "one_read, Resident 256, bf16, sm_90"),
        (SYMBOL.replace("ELi256E", "ELi256ENS0_7TanhCapE"), "one_read, Resident capped 256, bf16, sm_90"),
        ("_ZN4gspo3gpu10statisticsINS0_7Float16ELb1EEEvNS0_7OneReadE", "statistics, 1, fp16, sm_90"),
        ("_ZN4gspo3gpu10FromEdgeN7ILi8EfEEvi", "FromEdgeN7, 8, fp32, sm_90"),
        ("_Z5zerosPf", "zeros, sm_90"),
        ("$__internal_0_$__cuda_sm20_div_s64", "$__internal_0_$__cuda_sm20_div_s64, sm_90"),
    ],
)
def test_a_template_instance_has_a_readable_name(symbol: str, name: str) -> None:
    assert static_cuda.Instance.of(symbol, "sm_90").name == name


def test_figures_of_a_good_cuda_kernel() -> None:
    """float64 and calls behind the hot loops are no fault, nor is a second loop over what their unrolling leaves."""
    rest = [SUM[0], *["MUFU.EX2 R8, R8"] * 9, *["FFMA R8, R4, R5, R6"] * 40]
    behind = ["DFMA R4, R4, R6, R8", "CALL.REL.NOINC `($finish)", *loop(rest, ".L_x_4")]
    copy, read, write = Hot(0.25, 0.0, 32), Hot(4.312, 1.0312, 32), Hot(3.875, 1.0, 8)
    assert figures_of(resident(behind=behind)) == Figures(64, 1536, {"copy": copy, "read": read, "write": write})


def test_a_way_out_of_a_loop_is_no_call() -> None:
    assert not figures_of(resident(read=[*SUM, "@P2 CALL.REL.NOINC `(.L_x_9)"])).problems


def test_a_float32_vector_has_four_columns() -> None:
    body = ["LDS.128 R4, [R2]", *["MUFU.EX2 R8, R8"] * 5, "FFMA R8, R4, R5, R6"] * 4
    assert figures_of(resident(read=body), "fp32").loops["read"] == Hot(1.812, 1.25, 16)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"copy": ["LDGSTS.E.64 [R23], desc[UR6][R20.64]", *COPY]}, "copy loop: 1 accesses of less than 16 bytes"),
        ({"copy": COPY[:3]}, "no copy loop over whole vectors"),
        ({"read": [*SUM, "LDS R4, [R2]"]}, "read loop: 1 accesses of less than 16 bytes, such as LDS R4"),
        ({"read": ["LDS.U16 R4, [R2]"] * 32 + SUM[4:]}, "no read loop over whole vectors"),
        ({"read": replaced(SUM, "LDS", "@P1 LDS")}, "no read loop over whole vectors"),
        ({"read": replaced(SUM, "LDS", "LDG.E")}, "read loop: memory not by LDS and STG, [('LDG', 4)]"),
        ({"read": replaced(SUM, "LDS", "LD.E")}, "read loop: memory not by LDS and STG, [('LD', 4)]"),
        ({"read": [*SUM, "STL.128 [R1], R4"]}, "read loop: memory not by LDS and STG, [('STL', 1)]"),
        ({"read": [*SUM, "SHFL.BFLY PT, R4, R5, 0x10, 0x1f"]}, "read loop: lanes exchange data"),
        ({"read": [*SUM, "UCGABAR_WAIT"]}, "read loop: lanes exchange data"),
        ({"read": [*SUM, "DADD R4, R4, R6"]}, "read loop: float64, 1 times, such as DADD"),
        ({"read": [*SUM, "F2F.F64.F32 R4, R6"]}, "read loop: float64, 1 times, such as F2F"),
        ({"read": [*SUM, "CALL.REL.NOINC `($other)"]}, "read loop: calls a function"),
        ({"read": [*SUM, *["FADD R4, R5, R6"] * 55]}, "read loop: 6.031 instructions a column > 6 (100 FFMA, 55 FADD"),
        ({"write": [*GRADIENT, *["FADD R4, R5, R6"] * 18]}, "write loop: 6.125 instructions a column > 6"),
        ({"write": replaced(GRADIENT, "STG", "ST")}, "write loop: memory not by LDS and STG, [('ST', 1)]"),
        ({"write": GRADIENT[:-1] + ["STG.E.U16 [R2.64], R4"] * 8}, "no write loop over whole vectors"),
        ({"behind": ["STL.64 [R1], R4", "LDL.64 R4, [R1]"]}, "2 accesses to local memory in one_read"),
        ({"behind": ["$_Z1a$_ZN4gspo6finishEi:", "LDL R4, [R1]"]}, "1 accesses to local memory in finish"),
    ],
)
def test_a_bad_cuda_kernel_is_refused(bad: dict[str, list[str]], said: str) -> None:
    assert said in "; ".join(figures_of(resident(**bad)).problems)


def test_a_stack_is_refused() -> None:
    assert figures_of(resident(), STACK=16).problems == ("16 bytes of stack, 0 of local memory",)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_dtype_has_the_same_budget(dtype: str) -> None:
    body = [*SUM, *["FADD R4, R5, R6"] * 65]
    assert any("> 6 " in problem for problem in figures_of(resident(read=body), dtype).problems)


def test_a_softcap_has_a_budget_of_its_own() -> None:
    body = listing(loop([*READ, *["FADD R4, R5, R6"] * (20 * COLUMNS)]))
    for capped in (False, True):
        _, wrong = static_triton.read_sass(body, "fma.rn.f32", ["read"], "bf16", COLUMNS, capped=capped)
        assert bool(wrong) != capped


def test_the_kernels_are_those_of_the_cubin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_cuda, "KERNELS", (RESIDENT, Kernel("one_read", "Again", (), "LDG", ("sm_80",))))
    unknown = SYMBOL.replace("8Resident", "5Other")
    again = SYMBOL.replace("8Resident", "5Again")
    text = "\n".join(resident().replace("kernel", symbol) for symbol in (SYMBOL, unknown, again))
    printed = f"\n Function {SYMBOL}:\n  REG:64 STACK:0 SHARED:1536 LOCAL:0 CONSTANT[0]:768 TEXTURE:0\n"
    figures = static_cuda.read_cubin(text, static_sass.read_resources(printed), "sm_90")
    assert {name: f.problems for name, f in figures.items()} == {
        "one_read, Resident 256, bf16, sm_90": (),
        "one_read, Other 256, bf16, sm_90": ("KERNELS does not say what loops it must have",),
        "one_read, Resident, fp16, sm_90": ("not in rows.cu",),
        "one_read, Resident, fp32, sm_90": ("not in rows.cu",),
    }
    assert list(static_cuda.in_order([{"a, sm_90": GOOD}, {"a, b, sm_80": GOOD, "a, sm_80": GOOD}])) == [
        "a, sm_80", "a, sm_90", "a, b, sm_80"
    ]  # fmt: skip


def test_the_committed_figures_name_every_cuda_kernel_and_keep_the_budgets() -> None:
    if "nvcc" not in static_gate.load():
        pytest.skip("no figures by nvcc yet")
    wanted = {(row, dtype, target) for row in static_cuda.KERNELS for dtype in ITEM_BYTES for target in row.targets}
    for name, figures in static_gate.load()["nvcc"].figures.items():
        kernel, words, dtype, target = name.split(", ")
        row = static_cuda.Instance(kernel, tuple(words.split()), dtype, target).row
        assert row is not None
        assert set(figures.loops) == set(row.loops)
        budgets = {kind: static_cuda.budget(kind, dtype, row.capped) for kind in figures.loops}
        assert all(hot.instructions <= budgets[kind] for kind, hot in figures.loops.items())
        wanted.discard((row, dtype, target))
    assert not wanted
