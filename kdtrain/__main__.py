"""`python -m kdtrain`: the command line of cli.py."""

import sys

from kdtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
