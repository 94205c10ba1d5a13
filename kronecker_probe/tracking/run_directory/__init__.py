"""kronecker_probe/tracking/run_directory."""
