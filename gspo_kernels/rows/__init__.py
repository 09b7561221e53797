"""Vocabulary-sized work, one row a token: log-probability, entropy, logsumexp, gradient. Nothing here knows a loss."""
