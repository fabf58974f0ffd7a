"""A model on a server: real sockets, and a real tiny LLaVA behind them."""

import base64
import io
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from served_model import DROP, HANG, serving
from vlm_tables import picture, save_llava

from hipp_ext.errors import DataError, ServerError
from hipp_ext.evals.hipp_vlm import HippVLM
from hipp_ext.evals.served import ServedVLM
from hipp_ext.evals.served.address import check_address, is_local
from hipp_ext.evals.served.pictures import data_url
from hipp_ext.files.untrusted import read_picture


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_llava(tmp_path_factory.mktemp("models") / "tiny")


def messages(folder: Path, count: int = 8) -> list:
    file = folder / "square.png"
    file.write_bytes(base64.b64decode(picture("red")))
    return [
        [
            {"type": "image", "value": str(file)},
            {"type": "text", "value": "is there a blue square ?" + " the" * n},
        ]
        for n in range(count)
    ]


def test_answers_are_those_of_the_folder_and_come_in_order(llava, tmp_path):
    asked = messages(tmp_path)
    expected = [HippVLM(llava, "cpu").generate(message) for message in asked]
    with serving(llava) as server:
        server.delay = 0.05
        served = ServedVLM(server.address.removesuffix("/v1"), parallel=3)
        assert served.generate_batch(asked) == expected and len(set(expected)) > 2
    assert served.name == "org/tiny" and served.told == {"owned_by": "vllm", "root": str(llava)}
    assert server.together == 3
    for body in server.bodies:
        assert (body["temperature"], body["max_tokens"]) == (0, 16)
        assert body["repetition_penalty"] == 1  # else vLLM would take generation_config.json's


def test_what_passes_is_tried_again(llava, tmp_path):
    asked = messages(tmp_path, 4)
    with serving(llava) as server:
        served = ServedVLM(server.address, parallel=2, retries=3)
        server.faults = [429, 503, DROP, 500]
        answers = served.generate_batch(asked)
    assert len(server.bodies) == 8 and all(isinstance(answer, str) for answer in answers)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ((400, "At most 0 image(s) may be provided"), "check that org/tiny takes pictures there"),
        ((401, "expired KEY"), r"refuses the key, or wants one \(401: expired \*\*\*\)"),
        ((404, "gone"), "cannot ask org/tiny"),
        (429, "has too many requests .*--api-nproc"),
        ((500, "image input is not supported"), "llama.cpp needs --mmproj FILE"),
        ((200, "no choices"), "does not answer as OpenAI's protocol wants: .*localhost:8000/v1"),
        (DROP, "no server answers at http"),
        (HANG, "did not answer in time.*--timeout"),
    ],
)
def test_what_does_not_pass_is_explained(tmp_path, monkeypatch, fault, message):
    monkeypatch.setenv("MY_KEY", "KEY")
    with serving() as server:
        served = ServedVLM(server.address, retries=0, timeout=0.5, api_key_env="MY_KEY")
        server.faults = [fault] * 4
        with pytest.raises(ServerError, match=message):
            served.generate_batch(messages(tmp_path, 4))


def test_no_server_and_other_models():
    with serving(names=("a", "b")) as server:
        with pytest.raises(ServerError, match="serves a, b. Give the name of one"):
            ServedVLM(server.address)
        with pytest.raises(ServerError, match="serves no model c. It serves: a, b"):
            ServedVLM(server.address, "c")
        assert ServedVLM(server.address, "b").identity["name"] == "b"
        with pytest.raises(ServerError, match="has no list of models.*404"):
            ServedVLM(server.address.replace("/v1", "/v2"))
    with pytest.raises(ServerError, match="no server answers at .*Check that it is running"):
        ServedVLM(server.address, retries=0)


LISTS = [{"data": None}, {"data": [{"name": "x"}]}, {"data": [{"id": 5}]}, {"data": []}]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"<html>", "does not answer as OpenAI's protocol wants"),
        ([], "does not answer as OpenAI's protocol wants.*Check the address"),
        *((listed, "lists no models") for listed in LISTS),
    ],
)
def test_lists_of_models_that_are_none(listed, message):
    with serving() as server:
        server.listed = listed
        with pytest.raises(ServerError, match=message):
            ServedVLM(server.address)
        server.listed = {"data": [{"id": "m", "owned_by": ["x"], "meta": {"a": "b" * 3000}}]}
        assert len(str(ServedVLM(server.address).told)) < 2100


def test_half_a_character_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("served_model._generated", lambda *_: " Yes \ud800 ")
    with serving() as server:
        answer = ServedVLM(server.address).generate(messages(tmp_path, 1)[0])
    assert answer == "Yes ?"


def test_ctrl_c_does_not_wait_for_answers(tmp_path):
    with serving() as server:
        served = ServedVLM(server.address)
        server.faults = [HANG] * 4
        # A shell that starts the tests in the background makes them ignore the signal.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        begun = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                served.generate_batch(messages(tmp_path))
        finally:
            signal.signal(signal.SIGINT, before)
    assert time.monotonic() - begun < 10 and len(server.bodies) == 4


@pytest.mark.parametrize(
    ("typed", "address"),
    [
        ("http://localhost:8000", "http://localhost:8000/v1"),
        ("https://Host/api/v1/", "https://host/api/v1"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1"),
        (" http://[::1]:80/v1", "http://[::1]:80/v1"),
    ],
)
def test_addresses(typed, address):
    assert check_address(typed) == address
    assert is_local(address) == ("host" in typed and "Host" not in typed or "::1" in typed)


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("localhost:8000", "is not the address of a server. Give one such as"),
        ("ftp://host/v1", "is not the address"),
        ("http://host:port/v1", "is not the address"),
        ("http://", "is not the address"),
        (8000, "is not the address"),
        ("http://user:SECRET@host/v1", "address of host holds more than host, port and path"),
        ("http://host/v1?key=SECRET", "--api-key-env NAME"),
    ],
)
def test_addresses_that_cannot_be_used(typed, message):
    with pytest.raises(DataError, match=message) as error:
        check_address(typed)
    assert "SECRET" not in str(error.value)


def test_keys_come_from_the_environment_alone(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    with pytest.raises(DataError, match="NO_SUCH_KEY, which should hold the key, is not set"):
        ServedVLM("http://localhost:1", api_key_env="NO_SUCH_KEY")
    with pytest.raises(DataError, match="is not the name of one") as error:
        ServedVLM("http://localhost:1", api_key_env="sk-123")
    assert "sk-123" not in str(error.value)
    with serving(key="right") as server:
        with pytest.raises(ServerError, match="refuses the key") as refused:
            ServedVLM(server.address)
        assert "sk-of-another-server" not in str(refused.value)
        monkeypatch.setenv("MY_KEY", "right")
        assert ServedVLM(server.address, api_key_env="MY_KEY").name == "org/tiny"


def test_pictures_are_sent_as_a_folders_model_sees_them(tmp_path):
    plain = tmp_path / "plain.png"
    Image.frombytes("RGB", (5, 3), bytes(range(45))).save(plain)
    assert data_url(str(plain)).endswith(base64.b64encode(plain.read_bytes()).decode())
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 8, 7, 200, 100, 50])
    turned = Image.Exif()
    turned[0x0112] = 6
    for name, image, options in (
        ("jpeg.jpg", Image.effect_noise((16, 16), 90), {"quality": 70, "exif": turned}),
        ("clear.png", Image.new("RGBA", (4, 4), (10, 20, 30, 0)), {}),
        ("palette.png", palette, {"transparency": 1}),
        ("deep.png", Image.new("I;16", (4, 4), 40000), {}),
    ):
        image.save(tmp_path / name, **options)
        start, _, sent = data_url(str(tmp_path / name)).partition(",")
        seen = Image.open(io.BytesIO(base64.b64decode(sent)))
        assert start == "data:image/png;base64" and (seen.mode, seen.format) == ("RGB", "PNG")
        assert seen.tobytes() == read_picture(tmp_path / name).tobytes() and not seen.getexif()
    with pytest.raises(DataError, match="nowhere.png"):
        data_url("nowhere.png")
