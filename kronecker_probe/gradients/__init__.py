"""From a model, a loss and a batch to the gradient samples of each parameter.

In: a torch module and its examples, or the gradients along a run. Out: ``GradientSamples`` by
parameter name (``Capture``), or curvature products of the whole model.
May import: linalg and errors.
"""
