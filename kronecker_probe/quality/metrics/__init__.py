"""The catalog of metrics: one entry per metric, with its formula, options and form for estimates.

In: H and P as operators. Out: numbers, or ``UndefinedError`` with a reason code.
May import: operators, linalg, table, errors.
"""
