"""Who may call: a TOML file of keys, each a token's SHA-256 with what its holder is allowed.

    [[key]]
    name = "search"         # for logs; the rest but sha256 is optional
    sha256 = "9f86d0…"      # of the token, 64 hex digits
    tenant = "search"       # shares places and cache with its equals; default: a tenant of its own
    max_requests = 8        # calls at once
    max_prompt_tokens = 4096
    max_tokens = 512        # of an answer
    metrics = true          # may also read the HTTP port, which tells of all tenants; default: false

Tokens are 256 random bits, so a plain hash of one tells nothing: there is no dictionary to try.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagestream.server.errors import KeyLimitError
from pagestream.server.reload import Reloaded

LIMITS = ("max_requests", "max_prompt_tokens", "max_tokens")
_FIELDS = ("name", "sha256", "tenant", *LIMITS, "metrics")
_NAME = re.compile(r"[\w.@-]{1,64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Key:
    """What a caller is allowed; None is no limit of its own. The default is anybody, where there is no file of keys."""

    name: str = ""
    tenant: str | None = None
    max_requests: int | None = None
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    metrics: bool = False

    def check_prompt(self, num_tokens: int) -> None:
        """Raises KeyLimitError."""
        if self.max_prompt_tokens is not None and num_tokens > self.max_prompt_tokens:
            raise KeyLimitError(f"the prompt has {num_tokens} tokens; this key may send {self.max_prompt_tokens}")

    def answer_tokens(self, wanted: int | None) -> int | None:
        """The longest answer there may be; None for as many as fit. Raises KeyLimitError if more are asked for."""
        if wanted is None or self.max_tokens is None:
            return self.max_tokens if wanted is None else wanted
        if wanted > self.max_tokens:
            raise KeyLimitError(f"stop.max_tokens is {wanted}; this key may have {self.max_tokens}")
        return wanted


ANYBODY = Key()


class KeyFile:
    """The keys in a file, as it is now. Raises OSError, with one sentence, if it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._keys = Reloaded([path], lambda: _load(path))

    def find(self, token: str) -> Key | None:
        """The key of this token. Takes as long for a wrong token as for a right one, wherever it stands in the file."""
        digest = _digest(token)
        found = None
        for sha256, key in self._keys.get():
            if hmac.compare_digest(sha256, digest):
                found = key
        return found


def new_token() -> tuple[str, str]:
    """A token for a client and its hash for the file."""
    token = secrets.token_urlsafe(32)
    return token, _digest(token)


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def _load(path: Path) -> list[tuple[str, Key]]:
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # TOML or UTF-8
        raise OSError(f"{path}: {error}") from error
    listed = entries.pop("key", [])
    if entries or not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise OSError(f"{path}: only tables [[key]] belong here")
    keys = [parse_key(entry, f"{path}: key {number}") for number, entry in enumerate(listed, start=1)]
    for what, values in (("name", [key.name for _, key in keys]), ("sha256", [sha256 for sha256, _ in keys])):
        if len(set(values)) < len(values):
            raise OSError(f"{path}: two keys have the same {what}")
    return keys


def parse_key(entry: dict[str, Any], where: str) -> tuple[str, Key]:
    """A key and its hash. Raises OSError that says `where` it is and what is wrong with it."""
    unknown = sorted(entry.keys() - set(_FIELDS))
    if unknown:
        raise OSError(f"{where}: {unknown[0]} is not a field; there are {', '.join(_FIELDS)}")
    name, sha256, tenant = entry.get("name"), entry.get("sha256"), entry.get("tenant")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OSError(f"{where}: name must be 1 to 64 letters, digits or any of _.@-")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise OSError(f"{where}: sha256 must be 64 hex digits in lower case")
    if tenant is not None and (not isinstance(tenant, str) or not tenant):
        raise OSError(f"{where}: tenant must be a name")
    limits = {limit: entry[limit] for limit in LIMITS if limit in entry}
    for limit, value in limits.items():
        if type(value) is not int or value < 1:
            raise OSError(f"{where}: {limit} must be a whole number of at least 1")
    metrics = entry.get("metrics", False)
    if not isinstance(metrics, bool):
        raise OSError(f"{where}: metrics must be true or false")
    return sha256, Key(name, tenant, **limits, metrics=metrics)
