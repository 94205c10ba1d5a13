"""The fallback: gradients of each example by vmap or a loop, for parameters without a layer rule.

In: a model, a batch and its output gradients. Out: matrices [N, C, m, n], or a reason for none.
May import: gradients.tracing, linalg and errors.
"""
