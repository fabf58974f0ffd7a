"""Why a server did not answer, and what to do: one sentence each, without the key."""

from hipp_ext.errors import ServerError
from hipp_ext.files.untrusted import shown

_LONGEST = 400  # characters of a server's own words


def explained(
    error: Exception, base_url: str, model: str | None = None, key: str | None = None
) -> ServerError:
    """The error to raise for one of the package openai, after its retries.

    Args:
        error: what it raised; if none of its own errors, the answer was of another form.
        base_url: address of the server.
        model: name of the model that was asked; None while the server is asked what it serves.
        key: the key that was sent, which no message repeats.
    """
    import openai

    if isinstance(error, openai.APITimeoutError):
        text = (
            f"{base_url} did not answer in time. Ask it less at once (--api-nproc), or wait longer "
            "(--timeout)"
        )
    elif isinstance(error, openai.APIConnectionError):
        reason = error.__cause__ or error
        text = (
            f"no server answers at {base_url}: {reason}. Check that it is running and has loaded "
            "its model, and the address and its port"
        )
    elif isinstance(error, openai.APIStatusError):
        text = _status(error.status_code, base_url, model, _words(error))
    else:
        what = shown(repr(error), _LONGEST)
        text = (
            f"{base_url} does not answer as OpenAI's protocol wants: {what}. "
            "Check the address, such as http://localhost:8000/v1"
        )
    return ServerError(shown(text.replace(key, "***") if key else text, 1000))


def _words(error: object) -> str:
    """What the server says of its refusal."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else body
    return shown(message if isinstance(message, str) and message else str(error), _LONGEST)


def _status(code: int, base_url: str, model: str | None, words: str) -> str:
    if code in (401, 403):
        return (
            f"{base_url} refuses the key, or wants one ({code}: {words}). Put it into an "
            "environment variable, and give the variable's name: --api-key-env NAME"
        )
    if code == 404:
        what = "has no list of models" if model is None else f"cannot ask {shown(model)}"
        return (
            f"{base_url} {what} ({code}: {words}). Check the address, such as http://host:8000/v1"
        )
    if code == 429:
        return f"{base_url} has too many requests ({words}). Ask it less at once: --api-nproc"
    if code < 500 and model is not None:
        return (
            f"{base_url} refuses a question ({code}: {words}). Questions have one picture each: "
            f"check that {shown(model)} takes pictures there, and that its context is long enough"
        )
    hint = ". If it takes no pictures: llama.cpp needs --mmproj FILE" if "image" in words else ""
    return f"{base_url} failed ({code}: {words}){hint}"
