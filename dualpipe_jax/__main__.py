"""`python -m dualpipe_jax COMMAND`."""

import sys

from dualpipe_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
