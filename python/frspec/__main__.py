"""`python -m frspec`: the command line, where the command `frspec` is not in PATH."""

import sys

from .cli import main

sys.exit(main())
