"""kronecker_probe/optim/options."""
