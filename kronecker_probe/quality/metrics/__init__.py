"""kronecker_probe/quality/metrics."""
