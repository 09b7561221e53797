"""Everything that a GPU has to show, in one command and one budget of time: python -m benchmarks.gpu

    python -m benchmarks.gpu                            9 minutes: all parts in the order of __main__.parts
    python -m benchmarks.gpu --tune                     and, with what time is left, a sweep of launch sizes
    python -m benchmarks.gpu --only tests --minutes 5   some parts; the other parts' results in the file stay
    python -m benchmarks.gpu --smoke                    no GPU: tiny shapes on the CPU; does the machinery itself work?
    TRITON_INTERPRET=1 python -m benchmarks.gpu --smoke the same on the Triton kernels, ours and the peers': 2 minutes
    python -m benchmarks.gpu.goals [results.json]       the GPU's goals, measured; is CUDA C++ to run there unasked?

It takes the Python on PATH, needs no network, and writes gpu-<name of the GPU>.json and .log to benchmarks/results. A
peer that does not import is reported as absent. Each part is a process of its own with a limit of its own (`parts.py`):
a crash, a hang or a broken CUDA context loses what ran then and nothing else, and the file is whole at any moment.

`works.py` says what is timed, `contestants.py` who, `meter.py` how; `../truth.py` refuses to time a wrong answer.
`one_read.py` times CUDA C++ beside Triton where it has a kernel of its own; `faster.py` draws the conclusion.
`linear.py` does the same for the losses from hidden states, whose works and contestants are `../linear`'s.
"""
