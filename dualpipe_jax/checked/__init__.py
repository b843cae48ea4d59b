"""Configurations whose fields are checked against their annotations. Without jax.

Imports: nothing.
"""

from dualpipe_jax.checked.fields import (
    INT32_MAX as INT32_MAX,
    Count as Count,
    Range as Range,
    Size as Size,
    check_fields as check_fields,
)
