"""kronecker_probe/operators/factors."""
