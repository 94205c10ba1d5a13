"""Observing a forward pass without a trace: who reads each parameter, and where the batch is.

In: a model and a batch. Out: calls with their inputs and output gradients, and an account of what
they leave out. May import: gradients.layers, linalg and errors.
"""
