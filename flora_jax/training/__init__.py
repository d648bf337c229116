"""Training: inputs, loss, optimizer, sharding, step, checkpoints, loop."""
