"""Pictures from other machines, where the operator has named the hosts. A URL comes from a stranger: it must not reach what only this
machine can reach, nor anything that answers slowly or without end."""

import asyncio
import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

import httpx2

from pgjax.serving.requests import Refused

SECONDS = 10.0  # for the whole of a picture


async def fetch_image(url: str, hosts: Collection[str], limit: int, transport: httpx2.AsyncBaseTransport | None = None) -> bytes:
    """The file behind an https URL of one of `hosts`, of at most `limit` bytes.

    The host's name is looked up once, every address it has must be public, and the connection goes to the address that was checked (the
    certificate is still that of the name). No redirects, no proxies, no other port, no compression. `hosts` are in lower case.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise Refused(400, "invalid_image_url", "an image's URL cannot be read; give https://HOST/PATH or a data URL") from None
    if parts.scheme != "https" or host not in hosts or port not in (None, 443) or parts.username is not None:
        allowed = f"https URLs of {', '.join(sorted(hosts))}" if hosts else "data URLs alone"
        raise Refused(400, "image_url_not_allowed", f"this server takes {allowed}; send the image as data:image/png;base64,...")
    headers = {"Host": host, "Accept-Encoding": "identity"}  # and what comes is not unpacked: a small file could become a large one
    try:
        async with asyncio.timeout(SECONDS):
            address = await _public_address(host)
            bare = parts._replace(netloc=f"[{address}]" if ":" in address else address, fragment="").geturl()
            async with (
                httpx2.AsyncClient(trust_env=False, follow_redirects=False, timeout=SECONDS, transport=transport) as client,
                client.stream("GET", bare, headers=headers, extensions={"sni_hostname": host}) as response,
            ):
                if response.status_code != 200:
                    raise Refused(400, "image_not_fetched", f"the image's host answered {response.status_code}; no redirect is followed")
                data = bytearray()
                async for chunk in response.aiter_raw():
                    data += chunk
                    if len(data) > limit:
                        raise Refused(400, "image_not_fetched", f"the image's file has more than {limit} bytes; give a smaller one")
                return bytes(data)
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError):
        raise Refused(400, "image_not_fetched", "the image could not be fetched in time; send it as a data URL") from None


async def _public_address(host: str) -> str:
    found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(is_public, addresses)):
        raise Refused(400, "image_url_not_allowed", "the image's host is not on the public internet; send the image as a data URL")
    return addresses[0]


def is_public(address: str) -> bool:
    """A unicast address of the internet at large: not private, loopback, link-local, reserved, nor IPv4 in IPv6 clothes."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inside = ip in ipaddress.ip_network("2000::/3") and ip.sixtofour is None and ip.teredo is None
        return inside and ip.is_global and not ip.is_multicast
    return ip.is_global and not ip.is_multicast and not ip.is_reserved
