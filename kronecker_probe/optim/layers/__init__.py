"""kronecker_probe/optim/layers."""
