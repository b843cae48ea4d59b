"""`python -m dualpipe_jax COMMAND`."""

import sys

from dualpipe_jax.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
