"""Measuring along a training run, and storing what was measured.

In: a model, its optimizer and batches of a training loop; or a workload, trained here.
Out: measurement tables and checkpoints in a run directory, or a table in memory.
May import: ``workloads``, ``quality`` and what lies below them.
"""
