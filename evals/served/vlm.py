"""A model behind a server as a model that answers questions.

The questions, the pictures and the decoding are those of a model folder (`HippVLM`). The chat
template, the picture processor and the precision are the server's.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import DataError, ServerError
from hipp_ext.evals.hipp_vlm import MAX_NEW_TOKENS
from hipp_ext.evals.served.address import api_key, check_address
from hipp_ext.evals.served.connection import Connection, event_loop
from hipp_ext.evals.served.listing import find_model
from hipp_ext.evals.served.pictures import data_url
from hipp_ext.files.untrusted import shown
from hipp_ext.quantities import finite_option, whole_option

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Message = Sequence[dict[str, Any]]
Answered = Callable[[int, str], None]

RETRIES, TIMEOUT = 6, 600.0
_NO_PENALTY = {"repetition_penalty": 1.0}
# These servers take settings that a request leaves out from the model's generation_config.json.
_EXTRA_BODY: dict[str, dict[str, Any]] = {"vllm": _NO_PENALTY, "sglang": _NO_PENALTY}


class ServedVLM:
    """A served model that answers questions about images, several at once.

    It has the methods that VLMEvalKit calls on a model. The server is asked what it serves when
    the object is made, and everything else when there are questions.

    Args:
        base_url: address of the server, such as "http://localhost:8000/v1".
        name: name of the model on the server. Default: the only one that it serves.
        api_key_env: environment variable that holds the key. Default: no key is sent.
        parallel: number of requests at the same time.
        retries: number of further attempts after an answer 408, 409, 429 or 5xx and after a
            broken connection; the pauses grow, and a server may ask for longer ones.
        timeout: longest wait for an answer [s].
        max_new_tokens: maximum length of an answer [tokens].

    Attributes:
        base_url: the address, checked.
        name: name of the model on the server.
        told: what the server says of the model: the fields of /v1/models that do not change
            while it serves the same.

    Raises:
        DataError: the address, a number or the environment variable cannot be used.
        ServerError: there is no server, or it does not serve the model.
        MissingExtraError: the package openai is not installed.
    """

    INTERLEAVE = True
    is_api = True

    def __init__(
        self,
        base_url: str,
        name: str | None = None,
        *,
        api_key_env: str | None = None,
        parallel: int = 4,
        retries: int = RETRIES,
        timeout: float = TIMEOUT,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ):
        self.parallel = whole_option("parallel", parallel, DataError, 1)
        self.max_new_tokens = whole_option("max_new_tokens", max_new_tokens, DataError, 1)
        self._connection = Connection(
            base_url=check_address(base_url),
            key=api_key(api_key_env),
            retries=whole_option("retries", retries, DataError, 0),
            timeout=finite_option("timeout", timeout, DataError),
        )
        self.base_url = self._connection.base_url
        self.name, self.told = find_model(self._connection, name)

    @property
    def identity(self) -> dict[str, Any]:
        """All that is known of the model: two models that differ otherwise look the same."""
        return {"base_url": self.base_url, "name": self.name, "told": self.told}

    def set_dump_image(self, dump_image: Callable) -> None:
        """VLMEvalKit passes its function that writes images; messages name files already."""

    def generate(self, message: Message, dataset: str | None = None) -> str:
        """The answer to one VLMEvalKit message, as `HippVLM.generate`."""
        return self.generate_batch([message])[0]

    def generate_batch(self, messages: Sequence[Message]) -> list[str]:
        """The greedy answers to several messages, in their order."""
        answers: dict[int, str] = {}
        self.ask(messages, answers.__setitem__)
        return [answers[number] for number in range(len(messages))]

    def ask(self, messages: Iterable[Message], answered: Answered) -> None:
        """Call answered(number, answer) for every message, as soon as its answer is there.

        Requests of this call share connections; messages are taken from the iterable as needed.
        After an error no further answer is waited for.

        Raises:
            ServerError: a request failed for good; the message says why.
        """
        with event_loop() as call:
            call(self._ask_all, messages, answered)

    async def _ask_all(self, messages: Iterable[Message], answered: Answered) -> None:
        from anyio import create_task_group

        failures: list[Exception] = []
        numbered = enumerate(messages)

        async def work() -> None:
            try:
                for number, message in numbered:  # shared: each message is taken once
                    answered(number, await self._answer(client, message))
            except Exception as error:
                failures.append(error)
                group.cancel_scope.cancel()

        async with self._connection.client() as client, create_task_group() as group:
            for _ in range(self.parallel):
                group.start_soon(work)
        if failures:
            raise failures[0]

    async def _answer(self, client: "AsyncOpenAI", message: Message) -> str:
        content: list[Any] = [
            {"type": "image_url", "image_url": {"url": data_url(part["value"])}}
            if part["type"] == "image"
            else {"type": "text", "text": str(part["value"])}
            for part in message
        ]
        reply = await self._connection.request(
            partial(
                client.chat.completions.create,
                model=self.name,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.max_new_tokens,
                temperature=0,
                extra_body=_EXTRA_BODY.get(str(self.told.get("owned_by"))),
            ),
            self.name,
        )
        try:
            answer = (reply.choices[0].message.content or "").strip()
            return answer.encode(errors="replace").decode()  # JSON can hold half a character
        except (AttributeError, TypeError, LookupError):
            raise ServerError(
                f"{self.base_url} does not answer as OpenAI's protocol wants: "
                f"{shown(repr(reply), 300)}. Check that the address ends in the server's API, "
                "such as http://localhost:8000/v1"
            ) from None
