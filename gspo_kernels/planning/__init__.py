"""Memory and products of a loss before it runs, for `python -m gspo_kernels plan`. Nothing here is public."""
