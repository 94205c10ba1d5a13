"""kronecker_probe/table."""
