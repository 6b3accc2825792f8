"""One spelling for every JSON document that is hashed (RFC 8785), and the digests made of it."""

import hashlib
import json
from typing import Any

import rfc8785

from signal_store.errors import CorruptError


def canonical_json(value: Any) -> bytes:
    """The RFC 8785 bytes of a JSON value: equal values give equal bytes on every machine."""
    return rfc8785.dumps(value)


def digest(value: Any) -> str:
    """`sha256:` and the hex digest of the canonical JSON of a value."""
    return sha256(canonical_json(value))


def sha256(data: bytes | memoryview) -> str:
    """`sha256:` and the hex digest of bytes."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def parse_json(data: bytes, where: str) -> Any:
    """The JSON value in `data`; CorruptError naming `where` if it is none."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise CorruptError("not a JSON document", found=str(error), where=where, remedy="Restore this object.") from error
