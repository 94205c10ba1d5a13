"""kronecker_probe/findings."""
