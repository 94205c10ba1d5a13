"""kronecker_probe/optim/blocks."""
