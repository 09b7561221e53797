"""Policy losses: objectives, the token stage, reduction, and the public functions from logits and log-probabilities."""
