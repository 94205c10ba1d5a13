"""The target H of gradient samples: a planner, routes that give the same numbers, and kernels.

In: ``GradientSamples``. Out: ``SecondMoment``.
May import: operators.base and factors, gradients (its samples), linalg and errors.
"""
