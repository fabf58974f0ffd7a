"""Requests to a server with OpenAI's protocol, by the package openai, which tries them again."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import MissingExtraError
from hipp_ext.evals.served.address import is_local
from hipp_ext.evals.served.errors import explained

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_CONNECT = 10.0  # longest wait for a connection [s]


@dataclass(frozen=True, kw_only=True, repr=False)
class Connection:
    """How a server is reached.

    Attributes:
        base_url: its checked address.
        key: the key that it wants; None sends none.
        retries: number of further attempts.
        timeout: longest wait for an answer [s].
    """

    base_url: str
    key: str | None
    retries: int
    timeout: float

    def client(self) -> "AsyncOpenAI":
        """A client, to be used in an `async with` block.

        Raises:
            MissingExtraError: the package openai is not installed.
        """
        try:
            import openai
        except ImportError:
            raise MissingExtraError("openai", "vlmeval") from None
        # Not through a proxy that the environment names: the server is on this machine.
        local = openai.DefaultAsyncHttpxClient(trust_env=False) if is_local(self.base_url) else None
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self.key or "none",  # without it, openai sends that of OPENAI_API_KEY
            max_retries=self.retries,
            timeout=openai.Timeout(self.timeout, connect=min(_CONNECT, self.timeout)),
            http_client=local,
        )

    async def request(self, send: Callable[[], Any], model: str | None = None) -> Any:
        """What the async function `send` returns.

        Raises:
            ServerError: it failed for good. `model` is named as the one that was asked.
        """
        try:
            return await send()
        except Exception as error:  # openai raises almost anything for an answer of another form
            raise explained(error, self.base_url, model, self.key) from None


@contextlib.contextmanager
def event_loop() -> Iterator[Callable[..., Any]]:
    """Yields call(function, *arguments), which runs an async function and returns what it returns.

    The loop has a thread of its own, because a notebook already runs one. An exception in the
    block, such as ctrl-C, cancels the requests.
    """
    try:
        from anyio.from_thread import start_blocking_portal  # comes with openai
    except ImportError:
        raise MissingExtraError("openai", "vlmeval") from None

    with start_blocking_portal() as portal:
        yield portal.call
