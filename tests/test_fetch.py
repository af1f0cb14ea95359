"""Images of other machines: what a stranger's URL may reach."""

import asyncio
import gzip
import socket

import httpx2
import pytest

from pgjax.serving.fetch import fetch_image, is_public
from pgjax.serving.requests import Refused


def fetch(url: str, answer=None, limit: int = 1000) -> bytes:
    transport = httpx2.MockTransport(answer or (lambda _: pytest.fail("a request went out")))
    return asyncio.run(fetch_image(url, {"pictures.example", "localhost"}, limit, transport))


async def streamed(data: bytes):
    yield data


@pytest.fixture
def addresses(monkeypatch):
    """What names are looked up as."""
    found = ["93.184.216.34"]

    async def look_up(self, host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", look_up)
    return found


@pytest.mark.parametrize(
    "url",
    [
        "http://pictures.example/a.png",
        "https://pictures.example:8443/a.png",
        "https://user@pictures.example/a.png",
        "https://pictures.example.evil.example/a.png",
        "https://pictures.example:x/a.png",
        "https://[::1/a.png",
        "https://169.254.169.254/latest",
        "https:///a.png",
    ],
)
def test_urls_that_are_never_fetched(addresses, url):
    with pytest.raises(Refused) as error:
        fetch(url)
    assert error.value.status == 400 and "image" in error.value.code


PRIVATE = ("127.0.0.1", "10.0.0.1", "172.16.3.4", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1", "240.0.0.1")
PRIVATE_6 = ("::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::1", "2001:0:a00:1::1")


@pytest.mark.parametrize("address", [*PRIVATE, *PRIVATE_6])
def test_names_of_private_addresses_are_refused(addresses, address):
    assert not is_public(address)
    addresses.append(address)  # beside a public one
    with pytest.raises(Refused) as error:
        fetch("https://pictures.example/a.png")
    assert error.value.code == "image_url_not_allowed"


def test_a_picture_is_fetched_from_the_address_that_was_checked(addresses):
    asked = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append((str(request.url), request.headers["host"], request.extensions["sni_hostname"]))
        assert request.headers["accept-encoding"] == "identity"
        return httpx2.Response(200, content=streamed(b"picture"))

    assert fetch("https://pictures.example/a.png?b=c", answer) == b"picture"
    assert asked == [("https://93.184.216.34/a.png?b=c", "pictures.example", "pictures.example")] and is_public("2606:4700::1111")
    for other in (
        lambda _: httpx2.Response(302, headers={"Location": "https://127.0.0.1/"}),
        lambda _: httpx2.Response(200, content=streamed(b"a" * 1001)),
        lambda _: (_ for _ in ()).throw(httpx2.ConnectError("no")),
    ):
        with pytest.raises(Refused) as error:
            fetch("https://pictures.example/a.png", other)
        assert error.value.code == "image_not_fetched"


def test_what_comes_packed_stays_packed(addresses):
    packed = gzip.compress(bytes(100_000))
    answer = lambda _: httpx2.Response(200, headers={"Content-Encoding": "gzip"}, content=streamed(packed))  # noqa: E731
    assert fetch("https://pictures.example/a.png", answer) == packed
