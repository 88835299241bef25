"""API keys: kept as SHA-256, compared in constant time, never written anywhere."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence

_HASHED = re.compile(r"sha256:([0-9a-f]{64})")


def hash_key(key: str) -> str:
    """SHA-256 of a key, in hexadecimal digits."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_keys(text: str, where: str) -> tuple[str, ...]:
    """The hashes of keys that stand one a line: each as it is, or as `sha256:` and its hash. # starts a comment.

    Raises:
        ValueError: no key, one below 16 characters, or one with white space inside.
    """
    lines = [line.split("#")[0].strip() for line in text.splitlines()]
    found = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        hashed = _HASHED.fullmatch(line)
        if hashed is None and (len(line) < 16 or not line.isascii() or any(map(str.isspace, line))):
            raise ValueError(
                f"{where}: key {number} is no API key: it needs at least 16 characters of ASCII without spaces "
                "(for example from `openssl rand -hex 24`), or sha256: and the 64 digits of its hash"
            )
        found.append(hash_key(line) if hashed is None else hashed[1])
    if not found:
        raise ValueError(f"{where} has no API key; write one a line, or leave it out to let anybody call")
    return tuple(found)


def find_key(authorization: str | None, hashes: Sequence[str]) -> int | None:
    """Which of the keys a header `Authorization: Bearer KEY` gives; None where it is none of them.

    It takes the same time whichever key it is, or nearly is.
    """
    scheme, _, key = (authorization or "").partition(" ")
    digest = hash_key(key.strip() if scheme.lower() == "bearer" else "")
    found = None
    for number, known in enumerate(hashes):
        if hmac.compare_digest(digest, known):
            found = number
    return found
