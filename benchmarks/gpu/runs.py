"""The two runs: their parts in order, with the limit, the cost and the arguments of each. This is the one table of it.

`limit`: the most seconds of a part. `least`: it does not start with less, and the parts before it leave it that much.
`takes`: about what it takes on an H100. `patience`: seconds of silence after which its process counts as hung.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .parts import Part

ROWS, SMOKE_ROWS = 8_192, 16  # the goals are at 8,192 rows
WORKS = ("gspo", "gspo_on_policy", "forward", "grpo", "gspo_inactive")
OWN, SHAPES = ("gspo_on_policy", "grpo", "ppo"), ("bf16-151936", "bf16-151937", "fp32-151936", "fp32-151937")
# The first six cases are at the sizes of the goals. Cases that share logits stand together: those are built once.
ONE_READ = (
    *(f"{work}-bf16-151936-{rows}" for rows in (8_192, 1_024) for work in OWN),
    *(f"{work}-{shape}-4096" for shape in SHAPES for work in OWN[:2]),
    *(f"{work}-bf16-151936-32768" for work in OWN),
)
FIRST = 6
SMOKE_ONE_READ = (*(f"{work}-bf16-100-16" for work in OWN), "grpo-fp32-101-16")
LINEAR = (
    "dense",
    "inactive",
    "frozen_head",
    "forward",
    "products",
    "rows",
    "chunks_dense",
    "chunks_frozen_head",
    "chunks_forward",
)
PROFILED = (
    "forward", "gspo", "gspo_on_policy", "gspo_on_policy_fresh", "gspo_on_policy_cuda", "grpo", "grpo_cuda", "ppo_cuda",
    "gspo_inactive", "gspo_fresh",
)  # fmt: skip
KERNELS = ("forward", "backward", "forward_backward", "one_read")
SMOKE_KERNELS = ("forward", "one_read")
TESTS = ("test_rows.py", "test_triton_rows.py", "test_cuda_rows.py", "test_losses.py", "test_autograd.py")
SMOKE_TESTS = ("test_advantages.py",)
# After the first run's: where the kernels' own tests, then what stands on them, can find something on a GPU.
MORE_TESTS = (
    "test_row_independence.py", "test_linear.py", "test_linear_precision.py", "test_vocab_size.py", "test_stats.py",
    "test_group_of_one.py", "test_nan.py", "test_inputs.py", "test_derivatives.py",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One command: what it has to stay below, and its parts in order, the environment first."""

    name: str
    seconds: float
    parts: tuple[Part, ...]

    def part(self, name: str) -> Part | None:
        return next((part for part in self.parts if part.name == name), None)


def runs(smoke: bool = False) -> dict[str, Run]:
    """By name."""
    return {run.name: run for run in ((_smoke(run) if smoke else run) for run in (FIRST_RUN, SECOND_RUN))}


ENVIRONMENT = Part("environment", limit=40.0, least=5.0, takes=10.0, patience=40.0)
EXTENSION = Part("extension", limit=100.0, least=3.0, takes=3.0, patience=100.0, light=True)
BANDWIDTH = Part("bandwidth", limit=20.0, least=5.0, takes=5.0, patience=20.0)
_ROWS = (str(ROWS), "{bandwidth}")

FIRST_RUN = Run(
    "gpu",
    240.0,
    (
        ENVIRONMENT,
        EXTENSION,
        BANDWIDTH,
        Part("tests", "suite", limit=70.0, least=20.0, takes=65.0, patience=30.0, items=TESTS, together=True,
             light=True),
        Part("profile", limit=40.0, least=12.0, takes=15.0, patience=25.0, arguments=_ROWS, items=PROFILED),
        Part("speed", limit=42.0, least=15.0, takes=25.0, patience=25.0, arguments=_ROWS,
             items=tuple(f"{work}:ours" for work in WORKS)),
        # A process of its own: a fault of these kernels costs no other number.
        Part("one_read", limit=40.0, least=12.0, takes=25.0, patience=25.0, arguments=("{bandwidth}",),
             items=ONE_READ[:FIRST]),
        Part("variants", limit=48.0, least=15.0, takes=40.0, patience=30.0, items=KERNELS),
        Part("counters", limit=60.0, least=15.0, takes=40.0, patience=60.0, items=KERNELS),  # silent while ncu runs
    ),
)  # fmt: skip
SECOND_RUN = Run(
    "gpu-more",
    300.0,
    (
        ENVIRONMENT,
        EXTENSION,
        Part("peers", "speed", limit=75.0, least=20.0, takes=60.0, patience=40.0, arguments=_ROWS, items=WORKS,
             fallback=":ours"),
        Part("linear", limit=80.0, least=20.0, takes=60.0, patience=40.0, items=LINEAR, fallback=":ours"),
        Part("speed-1024", "speed", limit=35.0, least=10.0, takes=25.0, patience=20.0,
             arguments=("1024", "{bandwidth}"), items=WORKS, fallback=":ours"),
        Part("speed-32768", "speed", limit=45.0, least=15.0, takes=35.0, patience=25.0,
             arguments=("32768", "{bandwidth}"), items=WORKS, fallback=":ours"),
        Part("one_read-more", "one_read", limit=60.0, least=15.0, takes=40.0, patience=20.0,
             arguments=("{bandwidth}",), items=ONE_READ[FIRST:]),
        Part("tests-more", "suite", limit=40.0, least=15.0, takes=30.0, patience=30.0, items=MORE_TESTS,
             together=True, light=True),
        Part("memcheck", "sanitizer", limit=60.0, least=15.0, takes=20.0, patience=60.0, arguments=("memcheck",),
             light=True),
        Part("racecheck", "sanitizer", limit=45.0, least=10.0, takes=10.0, patience=45.0, arguments=("racecheck",),
             light=True),
    ),
)  # fmt: skip

# In a smoke run: tiny shapes, and one item or two of each part, so that a run takes seconds.
_SMOKE_ITEMS = {
    "tests": SMOKE_TESTS,
    "tests-more": SMOKE_TESTS,
    "profile": ("gspo", "grpo_cuda"),
    "speed": ("gspo:ours", "forward:ours"),
    "peers": ("gspo", "gspo_on_policy"),
    "one_read": SMOKE_ONE_READ[:2],
    "one_read-more": SMOKE_ONE_READ[2:],
    "variants": SMOKE_KERNELS,
    "counters": SMOKE_KERNELS,
    "linear": ("dense", "products"),
    "speed-1024": ("grpo",),
    "speed-32768": ("gspo_inactive",),
}


def _smoke(run: Run) -> Run:
    def smoke(part: Part) -> Part:
        rows = {str(ROWS): SMOKE_ROWS, "1024": SMOKE_ROWS // 2, "32768": SMOKE_ROWS * 2}
        arguments = tuple(str(rows.get(argument, argument)) for argument in part.arguments)
        return replace(part, arguments=("--smoke", *arguments), items=_SMOKE_ITEMS.get(part.name, ()))

    return replace(run, parts=tuple(smoke(part) for part in run.parts))
