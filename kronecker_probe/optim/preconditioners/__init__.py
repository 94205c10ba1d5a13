"""What each kind of preconditioner does for a stack of equal blocks.

In: gradients [K, *block] and the options of the kind. Out: directions, and operators per block.
May import: operators, linalg, layers, blocks, options, errors.
"""
