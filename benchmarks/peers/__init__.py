"""The same inputs through this package, TRL, verl, Liger and torch, in one process, on whatever device there is.

    make bench-peers                                 installs the peers; those that are missing are left out, and named
    python -m benchmarks.peers                       tables on the terminal: six minutes, 10 GB
    python -m benchmarks.peers --write cpu-<name>    and benchmarks/results/peers-cpu-<name>.json, and docs/peers.md
    python -m benchmarks.peers --smoke               tiny sizes: does it run at all?

Everybody's answer is held against float64 (`truth.py`): on a batch as it should be, which is also timed, and on the
hard cases (`inputs.py`). Nobody is disqualified: what a peer answers is what the tables say. Log-probabilities and
losses are each peer's own functions (`contestants.py`); only its trainer is left out.
"""
