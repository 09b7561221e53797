"""Speed, memory and precision of the losses on a CPU; every answer is checked before it is timed.

    pytest benchmarks                             from logits, every case, 2,048 rows: about 20 minutes, 9 GB
    pytest benchmarks --smoke                     64 rows, five cases that cover every option; and this folder's tests
    pytest benchmarks -k "bf16 and on_policy"     some cases, all contestants
    pytest benchmarks --gate                      figures for pytest-benchmark to save and compare: gate.py
    pytest benchmarks --save-results benchmarks/results/cpu-<name>.json
    python -m benchmarks.linear                   from hidden states: 20 minutes, 10 GB
    python -m benchmarks.linear_precision         which sequences are clipped, from bf16 hidden states: a minute
    python -m benchmarks.peers                    this package, TRL, verl, Liger and torch on the same inputs: 6 minutes
    python -m benchmarks.compare <commit>         this tree against another commit; fails beyond the noise
    python -m benchmarks.planned                  planned peaks of memory beside measured ones: 3 minutes
    python -m benchmarks.host                     the host's own time before a GPU has anything to do
    python -m benchmarks.plot                     the README's plot and the table of docs/cpu.md, from committed results
    python -m benchmarks.gpu                      the same on a GPU, and more: see gpu.py

`make bench`, `bench-linear`, `bench-precision` and `bench-compare BASE=<commit>` run these in an environment of their
own; `make bench-peers` installs the other libraries, pinned. One that is missing is recorded as absent.

`cases.py` lists the cases and builds their inputs, `truth.py` says what the answer must be (by tests/oracle.py),
`contestants.py` and `libraries.py` give it, `race.py` measures them in turn (A B C D, A B C D, ...): the speed of a
machine drifts, so that only ratios within one run mean something. Run on an otherwise idle machine.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # for `import oracle`, the tests' truth
