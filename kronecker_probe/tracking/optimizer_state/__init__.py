"""kronecker_probe/tracking/optimizer_state."""
