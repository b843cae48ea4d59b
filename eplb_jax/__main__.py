"""`python -m eplb_jax`."""

import sys

from eplb_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
