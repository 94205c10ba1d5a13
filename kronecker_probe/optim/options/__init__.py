"""Options: what users write (sections), and the kind of preconditioner that it describes (kinds).

In: sections, dicts of their fields, parameter groups. Out: a checked ``Recipe``.
May import: linalg, errors.
"""
