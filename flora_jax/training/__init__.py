"""Training: loss, optimizer, sharding, step, checkpoints, loop."""
