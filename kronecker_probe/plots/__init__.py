"""Table -> Axes: one subject a file, drawing only what the measurement table holds.

In: a measurement table, or a table of an analysis. Out: matplotlib Axes. May import ``table``,
``findings`` (for titles that say what to conclude) and ``errors``; never torch.
"""

from kronecker_probe.plots.gap import plot_gap as plot_gap
from kronecker_probe.plots.run import plot_ladder as plot_ladder
from kronecker_probe.plots.run import plot_spectrum as plot_spectrum
from kronecker_probe.plots.run import plot_trajectory as plot_trajectory
from kronecker_probe.plots.training import plot_training as plot_training

__all__ = ["plot_gap", "plot_ladder", "plot_spectrum", "plot_training", "plot_trajectory"]
