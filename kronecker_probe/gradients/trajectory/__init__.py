"""kronecker_probe/gradients/trajectory."""
