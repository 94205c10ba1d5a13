"""Ways to compute the numbers of a second moment: sample, parameter or dense space, one side.

In: samples through their kernels. Out: factors, Kronecker products and spectra.
May import: second_moment.kernels and cost_model, operators.factors, linalg and errors.
"""
