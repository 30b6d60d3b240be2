"""The one loop of all stages: state, optimizer, step, checkpoints, metrics."""
