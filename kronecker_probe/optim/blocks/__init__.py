"""Parameters cut into equal blocks, and products of stacks of them.

In: tensors of parameters, ``Shapes``. Out: stacks [K, *block], contractions, rounded averages.
May import: options, linalg, errors.
"""
