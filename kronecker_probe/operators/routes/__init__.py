"""Three exact ways to the same numbers: sample space, parameter space, dense."""
