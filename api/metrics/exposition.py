"""Who may read metrics, and how they are written: the same for every process."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import choose_encoder
from pydantic import SecretStr
from starlette.responses import Response

REFUSAL = (
    "Metrics are for this installation's operator: send 'Authorization: Bearer <UORA_METRICS_TOKEN>', or, where no "
    "token is set, ask from the machine itself and through no proxy."
)
#: A proxy on this machine makes everybody look local, unless it says for whom it asks.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-real-ip")

disable_created_metrics()  # type: ignore[no-untyped-call] # a series beside each, which readers here have no use for


def new_registry() -> CollectorRegistry:
    """One with the process's memory, processor time and open files."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    return registry


def may_read(token: SecretStr | None, *, client: str | None, headers: Mapping[str, str]) -> bool:
    """Whether a request may read metrics: with the token, or without one set, straight from this machine.

    Args:
        token: ``metrics_token`` of the settings.
        client: the address that the connection came from.
        headers: with names in lower case, or any case-insensitive mapping.
    """
    if token is not None and token.get_secret_value():
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        return scheme.lower() == "bearer" and hmac.compare_digest(
            sent.strip().encode(), token.get_secret_value().encode()
        )
    return _is_loopback(client) and not any(name in headers for name in _FORWARDED)


def exposition(registry: CollectorRegistry, *, accept: str) -> Response:
    """The metrics in the format that the reader prefers."""
    encode, content_type = choose_encoder(accept)
    return Response(encode(registry), headers={"content-type": content_type})


def _is_loopback(client: str | None) -> bool:
    try:
        address = ipaddress.ip_address(client or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
