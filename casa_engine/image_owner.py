"""Whose a request's image names are: clients with different keys do not share the UUIDs that they give to images.

Set where a request comes in, read where it is rendered. It is no secret and no permission: a digest that differs
between clients, and "" where they cannot be distinguished.
"""

import hashlib
from contextvars import ContextVar

from casa_engine.errors import InputError

OWNER: ContextVar[str] = ContextVar("casa_image_owner", default="")


def scope_image_name(uuid: object, cache_salt: object = None) -> str:
    """Return the name of an image that is unique to this request's client.

    Args:
        uuid: What the client calls it.
        cache_salt: The request's own, if it has one.

    Raises:
        InputError: The UUID is no text.
    """
    if not isinstance(uuid, str):
        raise InputError(f"an image's uuid is {type(uuid).__name__}; expected text.")
    try:
        words = [word.encode() for word in (OWNER.get(), str(cache_salt or ""), uuid)]
    except UnicodeEncodeError as error:
        raise InputError(
            "an image's uuid or the cache_salt holds half of a surrogate pair; expected text that can be written as "
            "UTF-8."
        ) from error
    digest = hashlib.sha256()
    for word in words:
        digest.update(len(word).to_bytes(8, "big") + word)
    return f"uuid:{digest.hexdigest()}"
