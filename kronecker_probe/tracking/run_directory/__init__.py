"""The files of a run: record, parts of the measurement table, checkpoints, lock.

In: tables, options, states of a training.
Out: files that are whole or absent; on reading, checked contents or one error that names the file.
May import: ``table``, ``errors``; only ``checkpoint`` imports torch, so that a run is read without.
"""
