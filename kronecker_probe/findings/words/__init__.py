"""The words for findings: one file per subject, each from code and numbers to sentences.

- In: a ``Finding`` without words.
- Out: the same with ``message`` and ``advice`` (``phrase.phrased``); nothing reads them again.
- May import: ``findings.codes``, ``findings.finding``, ``table``.

Each file holds ``MESSAGES`` (by code) and ``ADVICE`` (by remedy).
"""
