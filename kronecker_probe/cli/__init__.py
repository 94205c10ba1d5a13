"""kronecker_probe/cli."""
