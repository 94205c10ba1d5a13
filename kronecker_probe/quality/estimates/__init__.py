"""Quality numbers with their errors: plug-in, held-out and population; the jackknife.

In: a ``SecondMoment`` and names of approximations. Out: ``Estimate``.
May import: quality.metrics, approximations, operators and errors.
"""
