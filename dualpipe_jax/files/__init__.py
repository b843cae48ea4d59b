"""Files that other rooms read and write: found, replaced as a whole, and locked.

Imports: nothing.
"""

from dualpipe_jax.files.finding import (
    find_files as find_files,
    in_mixed_order as in_mixed_order,
    stdlib_files as stdlib_files,
)
from dualpipe_jax.files.lock import Lock as Lock
from dualpipe_jax.files.replacing import (
    remove_unfinished as remove_unfinished,
    replace_text as replace_text,
)
