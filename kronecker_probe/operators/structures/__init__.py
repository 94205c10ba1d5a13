"""kronecker_probe/operators/structures."""
