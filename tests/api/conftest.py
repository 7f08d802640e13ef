"""The live api for the tests of this folder."""

from hypothesis import settings as hypothesis_settings

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

# How long one example takes says more about what else runs on the machine than about the code.
hypothesis_settings.register_profile("uora", deadline=None)
hypothesis_settings.load_profile("uora")
