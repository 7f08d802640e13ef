"""Sessions of browsers: a signed cookie that stands for an API key. Nothing is stored about them.

The cookie holds the digest that is stored of the key, which nobody can send as a key. So whatever ends the key, its
revocation, its end or a new secret, ends the session too.
"""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta

from itsdangerous import BadSignature, URLSafeTimedSerializer

from api.errors import CsrfTokenInvalid, NotAuthenticated
from api.projects.service import hash_key

COOKIE = "uora_session"
CSRF_HEADER = "x-csrf-token"
LIFETIME = timedelta(hours=12)
#: Requests that change nothing, which need no token.
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class BrowserSessions:
    """Makes and reads the cookies.

    Args:
        secret: shared by all api processes; another one ends all sessions.
    """

    def __init__(self, secret: str) -> None:
        self._serializer = URLSafeTimedSerializer(
            secret,
            salt="uora.browser-session",
            signer_kwargs={"digest_method": hashlib.sha256, "key_derivation": "hmac"},
        )
        self._csrf_key = hashlib.sha256(f"uora.csrf-token:{secret}".encode()).digest()

    def begin(self, key: str) -> str:
        """The cookie of a session with this key, which was checked before."""
        return str(self._serializer.dumps(hash_key(key)))

    def key_digest(self, cookie: str) -> str:
        """The digest of the session's key; raises ``NotAuthenticated`` for a cookie that is old or not ours."""
        try:
            return str(self._serializer.loads(cookie, max_age=int(LIFETIME.total_seconds())))
        except BadSignature as error:
            raise NotAuthenticated("The session is over or was not begun here; sign in again.") from error

    def csrf_token(self, cookie: str) -> str:
        """What pages of the session send with each change, and pages of other sites cannot know."""
        return hmac.digest(self._csrf_key, cookie.encode(errors="surrogateescape"), "sha256").hex()

    def check_csrf(self, cookie: str, sent: str | None) -> None:
        """Raises ``CsrfTokenInvalid`` unless the session's token was sent."""
        if not hmac.compare_digest(self.csrf_token(cookie).encode(), (sent or "").encode(errors="surrogateescape")):
            found = "no" if sent is None else "another"
            raise CsrfTokenInvalid(
                f"Found {found} {CSRF_HEADER} header; a change with the session cookie needs the token that is in the "
                'pages as <meta name="csrf-token">. Reload the page; programs send an API key instead of the cookie.'
            )
