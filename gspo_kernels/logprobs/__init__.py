"""Layer 1: vocabulary-sized work. Knows rows, statistics and their gradients; has never heard of a loss."""
