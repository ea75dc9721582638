"""Names of tensors with the number of their layer taken out: `blocks.7.wq` is number 7 of `blocks.{layer}.wq`."""

import re

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)|(?<=^)\d+(?=\.)")


def split_layer(name: str) -> tuple[str, int | None]:
    """Return a name's pattern and its first number; the name itself and None where it has none."""
    match = NUMBER.search(name)
    if match is None:
        return name, None
    return f"{name[: match.start()]}{{layer}}{name[match.end() :]}", int(match[0])
