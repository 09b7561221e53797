"""What rollout engines return, correction weights, mismatch diagnostics and group advantages."""
