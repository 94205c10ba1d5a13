"""Estimates with error bars: of the sample, of held-out factors, and of the population."""
