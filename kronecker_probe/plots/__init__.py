"""kronecker_probe/plots."""
