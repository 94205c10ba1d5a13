"""kronecker_probe/optim/preconditioners."""
