"""What optimizers hold at a step: the preconditioner in use, its factors, and causes of its error.

In: an optimizer (ours, torch's, SOAP, or the user's with a registered reader), gradient samples.
Out: operators for the approximation "in-use", and rows about them.
May import: ``optim``, ``quality`` and what lies below them.
"""
