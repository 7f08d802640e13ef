"""The live api for the tests of this folder."""

from tests.api.fixtures import (  # noqa: F401 - pytest finds fixtures by their names here
    client,
    database,
    database_url,
    live_service,
    service,
    sessions,
    tenant,
    tenants,
)
