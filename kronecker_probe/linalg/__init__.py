"""Plain tensors in, plain tensors out."""
