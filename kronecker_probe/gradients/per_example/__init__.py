"""kronecker_probe/gradients/per_example."""
