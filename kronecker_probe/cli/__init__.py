"""The command line: commands, options, what the terminal shows, and exit codes.

In: arguments. Out: runs, figures and pages on disk, tables in the terminal, an exit code.
May import: every other folder.
"""
