"""``python -m kronecker_probe``: the same as the command ``kronecker-probe``."""

from kronecker_probe.cli.app import main

if __name__ == "__main__":
    main()
