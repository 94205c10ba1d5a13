"""What a measurement table says and what to do about it: facts, then findings, then words.

- In: a measurement table (``table/``).
- Out: a ``Diagnosis`` of ``Finding``s (code, subject, evidence, remedy, and the words for them),
  and the titles of figures.
- May import: ``table`` and ``errors``; no torch.

``facts`` reads numbers and codes off the table; ``gates`` decides that a finding abstains; one file
per subject (``distance``, ``in_use``, ``staleness``, ``factors``, ``run``) makes findings of facts;
``words`` makes sentences of findings, and nothing reads a sentence again. ``diagnose`` runs them.
"""
