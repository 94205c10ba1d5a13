"""The step of all presets: stacks of blocks, loading, inspection, the operator in use.

In: parameter groups with gradients. Out: moved weights; ``Inspection`` and operators.
May import: operators, linalg, preconditioners, layers, blocks, options, errors.
"""
