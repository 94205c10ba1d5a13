"""Quality numbers: metrics and the comparison table."""
