"""The measurement table: the contract between the code that measures and the code that reads.

In: rows of numbers with codes. Out: checked tables, Parquet parts, names, numbers with errors.
May import: errors; no torch.
"""
