"""The address of a server and its key, checked before anything is sent."""

import ipaddress
import os
import re
from urllib.parse import urlsplit, urlunsplit

from hipp_ext.errors import DataError
from hipp_ext.files.untrusted import shown

_ENDPOINT = "/chat/completions"


def check_address(url: str) -> str:
    """The address without an endpoint and a slash at its end; "/v1" is added to a host alone.

    Raises:
        DataError: it is not the address of a server, or holds a key or a password, which would be
            written to files.
    """
    try:
        parts = urlsplit(url.strip())
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except (ValueError, AttributeError):  # a port that is no number; no text
        usable = False
    if not usable:
        raise DataError(
            f"{shown(url)} is not the address of a server. Give one such as "
            "http://localhost:8000/v1"
        )
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise DataError(
            f"the address of {shown(parts.hostname)} holds more than host, port and path. Give a "
            "key in an environment variable: --api-key-env NAME, in Python api_key_env=NAME"
        )
    path = parts.path.rstrip("/").removesuffix(_ENDPOINT).rstrip("/")
    return urlunsplit((parts.scheme, parts.netloc.lower(), path or "/v1", "", ""))


def is_local(url: str) -> bool:
    """Whether an address leads to this machine, and so never through a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def api_key(variable: str | None) -> str | None:
    """The key that an environment variable holds; None without a variable.

    Raises:
        DataError: the variable is not set, or its name is none. The message never repeats a key
            that was given in the place of the name.
    """
    if variable is None:
        return None
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
        raise DataError(
            "the key is read from an environment variable, and what was given is not the name of "
            "one. Put the key into a variable, and give its name"
        )
    if key := os.environ.get(variable, "").strip():
        return key
    raise DataError(f"the environment variable {variable}, which should hold the key, is not set")
