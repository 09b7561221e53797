"""Each trainer's own arguments, made from one mini-batch: `step(batch)` calls the loss as that trainer calls it."""
