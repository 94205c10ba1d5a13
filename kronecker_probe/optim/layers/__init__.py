"""Statistics from the inputs and output gradients of layers: K-FAC's.

In: a model, whose forward and backward passes are recorded. Out: ``LayerSamples`` per parameter.
May import: gradients, blocks, options, errors.
"""
