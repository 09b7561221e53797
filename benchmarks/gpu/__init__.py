"""What a GPU has to show, in two runs of one program: python -m benchmarks.gpu [--more]

    python -m benchmarks.gpu                            240 s: tests, profiles, our kernels, variants, counters
    python -m benchmarks.gpu --more                     300 s: peers, linear, other sizes, sanitizers; adds to the first
    python -m benchmarks.gpu --only one_read:grpo-bf16-151936-8192   a part, and of its items one
    python -m benchmarks.gpu --smoke                    no GPU: tiny shapes on the CPU; does the machinery itself work?
    python -m benchmarks.gpu.goals [results.json]       the GPU's goals, measured; is CUDA C++ to run there unasked?
    python -m benchmarks.gpu.page [results.json]        the tables of docs/gpu.md

`runs.py` is the table of both runs' parts. They take the Python on PATH, need no network, and write
gpu-<name of the GPU>.json and .log to benchmarks/results or where --output says. Each part is a process of its own with
a limit of its own (`parts.py`): a crash, a hang or a broken CUDA context loses what ran then and nothing else, and the
file is whole at any moment. `carried.py` brings along what a machine without a network lacks: peers as wheels, a built
extension, a Triton cache. A peer that does not import is reported as absent.

`works.py` says what is timed, `contestants.py` who, `meter.py` how; `../truth.py` refuses to time a wrong answer.
`one_read.py` times CUDA C++ beside Triton where it has a kernel of its own; `faster.py` draws the conclusion.
`linear.py` does the same for the losses from hidden states, whose works and contestants are `../linear`'s.
"""
