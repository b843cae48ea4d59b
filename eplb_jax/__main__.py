"""`python -m eplb_jax`."""

import sys

from eplb_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
