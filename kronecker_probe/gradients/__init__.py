"""A model and a batch in, GradientSamples out."""
