"""The losses from hidden states against their own matrix products and against every peer that starts there too.

    python -m benchmarks.linear                             20 minutes, 10 GB; writes results/linear-cpu-<name>.json
    python -m benchmarks.linear --smoke                     tiny sizes, half a minute: does it run at all?
    python -m benchmarks.linear --only dense bf16           cases whose names have all these words
    python -m benchmarks.linear --budget 1800               more rounds
    python -m benchmarks.linear --markdown [results.json]   the README's table, from results
    python -m benchmarks.linear.goals [results.json]        the goals, measured
    python -m benchmarks.linear.precision                   what rounding logits does to GSPO's clip decisions; a minute

`make bench-peers` installs the peers, pinned; one that is not there is recorded as absent. `make bench-linear` runs
the first line. Like in the other benchmarks only ratios within one run mean something.

`cases.py` is the one list of cases, `contestants.py` and `peers.py` who runs them, `truth.py` what they must return,
`turns.py` how they share the time. `../gpu_linear.py` measures the same on a GPU.
"""
