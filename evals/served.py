"""Answers of a model behind a server that speaks OpenAI's protocol: vLLM, SGLang, llama.cpp, ...

The questions, the pictures and the decoding are those of a model folder (`HippVLM`). The chat
template, the picture processor and the precision are the server's.
"""

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from hipp_ext.errors import DataError, MissingExtraError, ServerError
from hipp_ext.evals.prediction_log import PredictionLog
from hipp_ext.evals.predictions import MAX_NEW_TOKENS
from hipp_ext.evals.served_address import api_key, check_address, is_local
from hipp_ext.evals.served_errors import explained
from hipp_ext.evals.served_pictures import data_url
from hipp_ext.files.untrusted import shown
from hipp_ext.quantities import finite_option, whole_option

if TYPE_CHECKING:
    from openai import AsyncOpenAI

Message = Sequence[dict[str, Any]]
Answered = Callable[[int, str], None]

RETRIES, TIMEOUT = 6, 600.0
_CONNECT = 10.0  # longest wait for a connection [s]
_LIST_RETRIES, _LIST_TIMEOUT = 1, 30.0  # of the first request, which is quick if there is a server
# Fields of /v1/models that stay the same as long as the server serves the same model.
_TOLD = ("root", "parent", "owned_by", "max_model_len", "meta")
_MAX_TOLD = 2000  # characters of them, as JSON
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
        self.base_url = check_address(base_url)
        self.parallel = whole_option("parallel", parallel, DataError, 1)
        self.retries = whole_option("retries", retries, DataError, 0)
        self.timeout = finite_option("timeout", timeout, DataError)
        self.max_new_tokens = whole_option("max_new_tokens", max_new_tokens, DataError, 1)
        self._key = api_key(api_key_env)
        self.name, self.told = self._find(name)

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
        with _event_loop() as call:
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

        async with self._client(self.retries, self.timeout) as client, create_task_group() as group:
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
        reply = await self._request(
            partial(
                client.chat.completions.create,
                model=self.name,
                messages=[{"role": "user", "content": content}],
                max_tokens=self.max_new_tokens,
                temperature=0,
                extra_body=_EXTRA_BODY.get(self.told.get("owned_by", "")),
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

    def _find(self, name: str | None) -> tuple[str, dict[str, Any]]:
        """The name of the model, and what the server says of it."""
        with _event_loop() as call:
            served = call(self._list)
        names = shown(", ".join(served) or "none", 1000)
        if name is None and len(served) == 1:
            (name,) = served
        if name is None:
            raise ServerError(f"{self.base_url} serves {names}. Give the name of one of them")
        if name not in served:
            raise ServerError(f"{self.base_url} serves no model {shown(name)}. It serves: {names}")
        return name, served[name]

    async def _list(self) -> dict[str, dict[str, Any]]:
        retries, timeout = min(_LIST_RETRIES, self.retries), min(_LIST_TIMEOUT, self.timeout)
        async with self._client(retries, timeout) as client:
            page = await self._request(client.models.list)
        try:
            rows = [row.model_dump() for row in page.data]
            return {row["id"]: _stable(row) for row in rows if isinstance(row["id"], str)}
        except (AttributeError, TypeError, LookupError):
            raise ServerError(
                f"{self.base_url}/models is not the list of models of OpenAI's protocol. Check "
                "the address, such as http://localhost:8000/v1"
            ) from None

    def _client(self, retries: int, timeout: float) -> "AsyncOpenAI":
        try:
            import openai
        except ImportError:
            raise MissingExtraError("openai", "vlmeval") from None

        local = openai.DefaultAsyncHttpxClient(trust_env=False) if is_local(self.base_url) else None
        return openai.AsyncOpenAI(
            base_url=self.base_url,
            api_key=self._key or "none",  # without it, openai sends that of OPENAI_API_KEY
            max_retries=retries,
            timeout=openai.Timeout(timeout, connect=min(_CONNECT, timeout)),
            http_client=local,  # not through a proxy that the environment names
        )

    async def _request(self, send: Callable[[], Any], model: str | None = None) -> Any:
        import openai

        try:
            return await send()
        except openai.OpenAIError as error:
            raise explained(error, self.base_url, model, self._key) from None


def answer_each(
    model: ServedVLM,
    log: PredictionLog,
    indices: Sequence[str],
    message: Callable[[int], Message],
    *,
    progress: str | None,
    limit: int | None = None,
) -> None:
    """Ask a served model the rows that are not in the log, and log each answer as it comes.

    No answer depends on which questions are asked together, as far as the server keeps them apart,
    so the log is in the order in which the answers came.

    Args: as `predictions.answer_rows`.
    """
    from tqdm import tqdm

    needed = indices if limit is None else indices[:limit]
    rows = [row for row, index in enumerate(needed) if index not in log.answers]
    if not rows:
        return
    with contextlib.closing(
        tqdm(
            total=len(needed),
            initial=len(needed) - len(rows),
            desc=progress,
            disable=progress is None,
        )
    ) as bar:

        def keep(number: int, answer: str) -> None:
            log.add([(indices[rows[number]], answer)])
            bar.update()

        model.ask(map(message, rows), keep)


@contextlib.contextmanager
def _event_loop() -> Iterator[Callable[..., Any]]:
    """Yields call(function, *arguments), which runs an async function and returns what it returns.

    The loop has a thread of its own, because a notebook already runs one. An exception in the
    block, such as ctrl-C, cancels the requests.
    """
    from anyio.from_thread import start_blocking_portal

    with start_blocking_portal() as portal:
        yield portal.call


def _stable(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model in /v1/models that identify it."""
    told = {field: row[field] for field in _TOLD if row.get(field) is not None}
    text = json.dumps(told, sort_keys=True)
    return json.loads(text) if len(text) <= _MAX_TOLD else {"long": text[:_MAX_TOLD]}
