"""The same losses from hidden states and the LM head, a chunk of logits at a time."""
