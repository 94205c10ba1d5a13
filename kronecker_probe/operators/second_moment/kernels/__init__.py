"""kronecker_probe/operators/second_moment/kernels."""
