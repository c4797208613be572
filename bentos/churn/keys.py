"""Who may ask /predict: API keys, one file each in a folder, and the token by which our own jobs are known.

A mounted Secret is such a folder: a file's name is the caller's, its content the key. The folder is looked at again
and again, so that keys come and go without a restart. One that cannot be used keeps a process from getting ready;
later it changes nothing, and the log says why. What is shown is compared with every key, in constant time.
"""

from __future__ import annotations

import hmac
import logging
import re
import threading
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from bentos.churn.requests import RequestError

log = logging.getLogger(__name__)

LOOK_SECONDS = 5.0
PROBE = "probe"  # the source, and for the metric the name, of those that show the token

_USABLE = re.compile(rb"[!-~]{16,1024}")  # what a header can carry, and nobody can guess


class KeysError(ValueError):
    """The folder of keys cannot be used; says why, and no key."""


def read_keys(folder: Path) -> dict[str, bytes]:
    """The hash of each key by the name of its file, or KeysError."""
    try:
        whole = folder / "..data"  # by this link the kubelet exchanges all files of a Secret at once
        whole = whole.resolve() if whole.is_dir() else folder
        keys = {path.name: path.read_bytes().strip() for path in sorted(whole.iterdir()) if path.name[0] != "."}
    except OSError as error:
        raise KeysError(f"CHURN_API_KEYS_DIR is {folder}, which cannot be read: {error.strerror}") from None
    if not keys:
        raise KeysError(f"CHURN_API_KEYS_DIR is {folder}, which is empty; expected a file for each key")
    wrong = [name for name, key in keys.items() if not _USABLE.fullmatch(key)]
    if wrong:
        raise KeysError(
            f"CHURN_API_KEYS_DIR is {folder}, where {', '.join(wrong)} cannot be used; "
            "expected keys of 16 to 1,024 visible ASCII characters"
        )
    return {name: _hash(key) for name, key in keys.items()}


class Callers:
    """Lets requests in. Told neither folder nor token it lets in everybody, and believes who claims to be a probe."""

    def __init__(self, folder: Path | None = None, probe_token: str = "") -> None:
        self.required = folder is not None  # a request must show a key
        self.requests: dict[str, int] = {}  # let in, by the key's name
        self._folder = folder
        self._keys = {} if folder is None else read_keys(folder)
        self._token = _hash(probe_token.encode()) if probe_token else None
        self._fault = ""

    def admit(self, headers: Iterable[tuple[bytes, bytes]], source: str) -> str:
        """What the log will have as the request's source; RequestError if it shows no key that is known."""
        if not self.required and self._token is None:
            return source
        key = token = b""
        for name, value in headers:
            if name == b"authorization" and value[:7].lower() == b"bearer ":
                key = value[7:].strip()
            elif name == b"x-api-key":
                key = value
            elif name == b"x-churn-probe-token":
                token = value
        ours = self._token is not None and hmac.compare_digest(self._token, _hash(token))
        if self.required:
            caller = PROBE if ours else self._caller(_hash(key))
            if caller is None:
                raise RequestError(401, "unauthorized", "expected an API key: Authorization: Bearer KEY")
            self.requests[caller] = self.requests.get(caller, 0) + 1
        return source if ours else "client"

    def _caller(self, shown: bytes) -> str | None:
        found = None
        for name, known in self._keys.items():
            if hmac.compare_digest(known, shown):  # no early exit: how long it takes tells nothing
                found = name
        return found

    def watch(self) -> None:
        """Look at the folder from now on, in a thread that ends with the process."""
        if self._folder is not None:
            threading.Thread(target=self._watch, name="keys", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(LOOK_SECONDS)
            self.look()

    def look(self) -> None:
        """Take the keys that are in the folder now; if these cannot be used, those that were stay."""
        if self._folder is None:
            return
        try:
            found = read_keys(self._folder)
        except KeysError as fault:
            if str(fault) != self._fault:
                log.error("API keys stay as they were: %s", fault)
            self._fault = str(fault)
            return
        if self._fault or found != self._keys:
            log.info("API keys are now those of %s", ", ".join(found))
        self._keys, self._fault = found, ""


def _hash(key: bytes) -> bytes:
    """Of one length, so that comparing does not tell that of a key."""
    return sha256(key).digest()
