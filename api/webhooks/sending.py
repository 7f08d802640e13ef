"""A signed POST to a URL that a user chose: only to addresses that were checked, without redirects, within a time."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import ipaddress
import secrets
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import httpx

from api.errors import InvalidRequest

#: From the first look-up of the name to the status line.
TIMEOUT_SECONDS = 15.0
CONNECT_SECONDS = 5.0
SECRET_PREFIX = "whsec_"  # noqa: S105 # begins every secret
_SECRET_BYTES = 32
_MAX_URL_LENGTH = 2048
_HEADERS = {"Content-Type": "application/json", "User-Agent": "uora-webhooks/1"}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Message:
    """What is sent: the id is the same in every attempt, the body to the byte too."""

    id: str
    url: str
    body: bytes
    #: The first is the endpoint's; an older one signs beside it for as long as it is valid.
    secrets: Sequence[str]


@dataclass(frozen=True)
class Sent:
    """What came of it: a status code, or why there is none."""

    status_code: int | None
    error: str | None
    milliseconds: int

    @property
    def delivered(self) -> bool:
        """Whether the receiver took it."""
        return self.status_code is not None and 200 <= self.status_code < 300


class AddressRefused(Exception):
    """The URL's host has no address that may be reached."""


def new_secret() -> str:
    """A signing secret, as ``client.webhooks.unwrap`` takes it."""
    return SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def sign(message: Message, *, timestamp: int) -> dict[str, str]:
    """The headers of the Standard Webhooks specification, over ``id.timestamp.body``."""
    signed = f"{message.id}.{timestamp}.".encode() + message.body
    signatures = [hmac.new(_key(secret), signed, hashlib.sha256).digest() for secret in message.secrets]
    return {
        "webhook-id": message.id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(signature).decode()}" for signature in signatures),
    }


def check_url(url: str, *, allow_private: bool) -> None:
    """Refuse what can never be sent to. A name is looked up when something is sent: it may be another address by then.

    Raises:
        InvalidRequest: no https URL, or one with a user, or with an address that may not be reached.
    """
    schemes = ("https", "http") if allow_private else ("https",)
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"url: {error}.", param="url") from error
    if len(url) > _MAX_URL_LENGTH or parsed.scheme not in schemes or not parsed.host or parsed.userinfo:
        expected = " or ".join(f"{scheme}://" for scheme in schemes)
        raise InvalidRequest(
            f"url: found {url[:80]!r}; expected {expected}, a host, no user, and {_MAX_URL_LENGTH} characters at most.",
            param="url",
        )
    try:
        addresses = [ipaddress.ip_address(parsed.host)]
    except ValueError:
        return  # a name
    try:
        _allowed(addresses, host=parsed.host, allow_private=allow_private)
    except AddressRefused as error:
        raise InvalidRequest(f"url: {error}", param="url", code="address_refused") from error


async def send(message: Message, *, allow_private: bool, timeout: float = TIMEOUT_SECONDS) -> Sent:
    """One attempt. Whatever the receiver or the network does, it ends in time and raises nothing."""
    started = time.monotonic()
    status_code = error = None
    try:
        headers = sign(message, timestamp=int(time.time())) | _HEADERS
        async with asyncio.timeout(timeout):
            status_code = await _post(httpx.URL(message.url), message.body, headers, allow_private=allow_private)
    except TimeoutError:
        error = f"No answer within {timeout:g} s."
    except AddressRefused as refused:
        error = str(refused)
    except Exception as failure:  # what is not recorded would be tried for ever
        error = f"{type(failure).__name__}: {failure}"[:500]
    return Sent(status_code=status_code, error=error, milliseconds=round((time.monotonic() - started) * 1000))


async def _post(url: httpx.URL, body: bytes, headers: dict[str, str], *, allow_private: bool) -> int:
    """The status code, from the first of the host's addresses that can be connected to; the body is not read."""
    addresses = _allowed(await _look_up(url), host=url.host, allow_private=allow_private)
    headers = headers | {"Host": url.netloc.decode("ascii")}
    # The certificate must be the name's, though the connection is to the address that was checked.
    extensions = {"sni_hostname": url.raw_host.decode("ascii")}
    # No proxy of the environment: it would look the name up again. Who calls limits the whole; this, one dead address.
    limit = httpx.Timeout(TIMEOUT_SECONDS, connect=CONNECT_SECONDS)
    async with httpx.AsyncClient(verify=_tls(), trust_env=False, follow_redirects=False, timeout=limit) as client:
        for number, address in enumerate(addresses, 1):
            target = url.copy_with(host=str(address))
            request = client.build_request("POST", target, content=body, headers=headers, extensions=extensions)
            try:
                answer = await client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if number == len(addresses):
                    raise
                continue
            await answer.aclose()
            return answer.status_code
    raise AddressRefused(f"{url.host} has no address.")


async def _look_up(url: httpx.URL) -> list[Address]:
    port = url.port or (443 if url.scheme == "https" else 80)
    host = url.raw_host.decode("ascii")
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [ipaddress.ip_address(str(sockaddr[0]).partition("%")[0]) for *_, sockaddr in found]


def _allowed(addresses: Sequence[Address], *, host: str, allow_private: bool) -> list[Address]:
    """Those that may be reached.

    Raises:
        AddressRefused: there is none.
    """
    allowed = [address for address in addresses if allow_private or is_public(address)]
    if not allowed:
        found = ", ".join(map(str, addresses)) or "no address"
        raise AddressRefused(
            f"{host} is {found}, which is not on the public internet. Give another host, or let the operator set "
            "UORA_WEBHOOK_ALLOW_PRIVATE."
        )
    return allowed


def is_public(address: Address) -> bool:
    """Whether an address is on the public internet, and so is every address that is wrapped in it."""
    if isinstance(address, ipaddress.IPv6Address):
        wrapped = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ()), _nat64(address)]
        if any(inner is not None and not is_public(inner) for inner in wrapped):
            return False
    return address.is_global and not address.is_multicast


def _nat64(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that a translator of the well-known prefix would connect to."""
    if address not in ipaddress.IPv6Network("64:ff9b::/96"):
        return None
    return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _key(secret: str) -> bytes:
    try:
        return base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except binascii.Error as error:
        raise ValueError("the stored signing secret is no base64; rotate it") from error


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context()
