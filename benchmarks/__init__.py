"""How fast the losses are, how near to the speed of memory, and how little they allocate; checked before timed.

    pytest benchmarks                                       every case, 2,048 rows: about 20 minutes, 9 GB
    pytest benchmarks --smoke                               64 rows, five cases that cover every option: half a minute
    pytest benchmarks -k "bf16 and on_policy"               some cases, all contestants
    GSPO_BENCH_ROWS=512 pytest benchmarks                   fewer rows
    pytest benchmarks --save-results benchmarks/results/cpu-<name>.json
    python -m benchmarks.goals [results.json]               the project's goals, measured
    python -m benchmarks.plot [results.json] [plot.png]     the README's plot, and the table of docs/cpu.md
    python -m benchmarks.gpu                                the same on a GPU, and more: see gpu.py
    python -m benchmarks.compare <commit>                   this tree against another commit; fails beyond the noise

`make bench ARGS=...` and `make bench-compare BASE=<commit>` do the same in an environment of their own.

`cases.py` is the one list of cases, `contestants.py` who runs them, `truth.py` what they must return, `race.py` how
they are measured: in turn (A B C D, A B C D, ...), because the speed of a machine drifts, so that only ratios within
one run mean something. Run on an otherwise idle machine.
"""
