"""kronecker_probe/gradients/tracing."""
