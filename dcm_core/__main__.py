"""`python -m dcm_core`: the command line of `cli`, started from the pack's folder."""

import sys

from cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
