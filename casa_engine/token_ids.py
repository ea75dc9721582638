"""Token ids as configurations of transformers name them: one, several or none."""

from collections.abc import Sequence


def list_token_ids(value: int | Sequence[int] | None) -> list[int]:
    """Return the ids of a field such as `eos_token_id`, which is a number, a list of them or None."""
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)
