"""Which models a server has, and what it says of them."""

import json
from dataclasses import replace
from typing import Any

from hipp_ext.errors import ServerError
from hipp_ext.evals.served.connection import Connection, event_loop
from hipp_ext.files.untrusted import shown

_RETRIES, _TIMEOUT = 1, 30.0  # of the list, which comes quickly if there is a server
# Fields of a model in the list that stay as long as the server serves the same.
_STABLE = ("root", "parent", "owned_by", "max_model_len", "meta")
_LONGEST = 2000  # characters of these fields, as JSON


def find_model(connection: Connection, name: str | None) -> tuple[str, dict[str, Any]]:
    """Name of a model, and what the server says of it.

    Args:
        connection: the server.
        name: name of the model; None: the only one.

    Raises:
        ServerError: there is no server, or no such model, or several.
    """
    patience = dict(
        retries=min(_RETRIES, connection.retries), timeout=min(_TIMEOUT, connection.timeout)
    )
    with event_loop() as call:
        served = call(_listed, replace(connection, **patience))
    where, names = connection.base_url, shown(", ".join(served), 1000)
    if name is None and len(served) == 1:
        (name,) = served
    if name is None:
        raise ServerError(
            f"{where} serves {names}. Give the name of one of them: --model, in Python name"
        )
    if name not in served:
        raise ServerError(f"{where} serves no model {shown(name)}. It serves: {names}")
    return name, served[name]


async def _listed(connection: Connection) -> dict[str, dict[str, Any]]:
    async with connection.client() as client:
        page = await connection.request(client.models.list)
    try:
        rows = [row.model_dump(warnings=False) for row in page.data]
        served = {row["id"]: _stable(row) for row in rows if isinstance(row["id"], str)}
    except (AttributeError, TypeError, LookupError):
        served = {}
    if not served:
        raise ServerError(
            f"{connection.base_url}/models lists no models, as OpenAI's protocol does. Check the "
            "address, such as http://localhost:8000/v1"
        )
    return served


def _stable(row: dict[str, Any]) -> dict[str, Any]:
    told = {field: row[field] for field in _STABLE if row.get(field) is not None}
    text = json.dumps(told, sort_keys=True)
    return json.loads(text) if len(text) <= _LONGEST else {"long": text[:_LONGEST]}
