"""kronecker_probe/optim/engine."""
