"""The one place that reads what gradient samples are held in, and sums over them.

In: ``GradientSamples`` of each kind. Out: float64 sums, products of pairs, and their costs.
May import: gradients.samples, operators.factors.vectors, second_moment.cost_model, linalg.
"""
