"""kronecker_probe/report."""
