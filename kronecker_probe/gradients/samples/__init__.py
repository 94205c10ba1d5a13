"""kronecker_probe/gradients/samples."""
