"""Validation of names, with a hint to the nearest valid name."""

import difflib
from collections.abc import Sequence


def check_name(argument: str, value: str, names: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `names`."""
    if value not in names:
        nearest = difflib.get_close_matches(str(value), names, n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"{argument} is {value!r}: it must be one of {', '.join(names)}{hint}")
