"""How good an approximation P of a second moment H is: metrics, estimates, and their table.

In: gradient samples, operators. Out: ``Estimate``, ``Scores``, rows of the measurement table.
May import: approximations, operators, gradients, linalg, table, errors.
"""
