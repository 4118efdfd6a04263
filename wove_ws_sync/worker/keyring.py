"""Whom a worker service knows: the ``--security`` value as keys.

Owns: reading that value, and the files that it names, again when one of them has changed. Never:
sees a handshake; what is wrong in a changed file is logged, and the keys from before stay.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import tomllib
from collections.abc import Mapping
from typing import Any

import wove

from .._checks import flag, seconds, show, unknown
from .._keys import Key, KeyPair, SharedKey, private_key, public_key, read_secret
from .tokens import TokenVerifier

__all__ = ["Keyring", "Keys"]

_logger = logging.getLogger("wove_ws_sync.worker")

_LABEL = "security"
_SECRETS = ("secret", "secret_env", "secret_file")
_TYPES = ("signed", "bearer", "none", "ed25519", "jwt")
#: What this package adds to a signed value.
_OURS = frozenset({"keys", "secret_file"})
_OPTIONS = ("clock_skew_seconds", "remember_nonces")
#: Files are looked at no more often than this, in seconds: a flood of handshakes must not cost more.
_LOOK_EVERY = 1.0


class Keys:
    """What one version of the value says: frozen.

    ``mode`` is "none", "signed", "bearer", "ed25519" or "jwt"; ``by_id`` has the keys of each key
    id, ``token`` is that of "bearer", ``verifier`` judges those of "jwt". Raises what Wove raises
    for a wrong value.
    """

    def __init__(self, config: Any) -> None:
        self.by_id: dict[str, list[Key]] = {}
        self.token = b""
        self.verifier: TokenVerifier | None = None
        self.skew = 300.0
        self.remembers = True
        self.files: list[str] = []
        if isinstance(config, str) and config.startswith("file:"):
            config = self._from_file(config[5:])
            if config.get("type", "signed") in ("signed", "bearer") and not _OURS.intersection(config):
                _check_names(config, {"type", "key", "secret", "secret_env", "token", "token_env", *_OPTIONS})
        if isinstance(config, Mapping) and config.get("type", "signed") not in _TYPES:
            raise ValueError(f"{_LABEL}.type must be one of: {', '.join(map(repr, _TYPES))}.")
        if isinstance(config, Mapping) and config.get("type") == "ed25519":
            self.mode = "ed25519"
            _check_names(config, {"type", "hosts", "private_key_file", *_OPTIONS})
            self._take_options(config)
            self._take_key_pairs(config)
        elif isinstance(config, Mapping) and config.get("type") == "jwt":
            self.mode, self.verifier = "jwt", TokenVerifier(config)
        elif isinstance(config, Mapping) and _OURS.intersection(config):
            self.mode = "signed"
            _check_names(config, {"type", "key", "keys", *_SECRETS, *_OPTIONS})
            self._take_options(config)
            self._take_secrets(config)
        else:
            self._take_wove(config)
        if not (math.isfinite(self.skew) and self.skew > 0):
            raise ValueError(f"{_LABEL}.clock_skew_seconds must be a number above 0, not {self.skew!r}.")

    def __repr__(self) -> str:
        return f"<Keys {self.mode} {sorted(self.by_id)}>"

    @property
    def secrets(self) -> list[bytes]:
        """Return what a reader of the status page may show, instead of signing."""
        if self.mode == "bearer":
            return [self.token]
        return [key.secret for keys in self.by_id.values() for key in keys if key.secret]

    def _from_file(self, path: str) -> Any:
        self.files.append(path)
        try:
            with open(path, "rb") as file:
                config = tomllib.load(file)
        except OSError as exc:
            raise RuntimeError(f"{_LABEL} file {path!r} cannot be read: {exc.strerror}.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):  # the text of the error may be that of a secret
            config = None
        if not config:
            raise ValueError(f"{_LABEL} file {path!r} is no TOML file of a security dictionary.")
        return config

    def _take_wove(self, config: Any) -> None:
        try:
            security = wove.NetworkExecutorSecurity.from_config(config)
        except UnicodeEncodeError:  # it carries the secret that it could not encode
            security = None
        if security is None:
            raise ValueError("The secret of the worker service is not valid Unicode; use plain text.")
        self.mode = str(security.mode)
        if self.mode == "bearer":
            self.token = str(security.token).encode("utf-8")
        elif self.mode == "signed":
            if not security.secret:
                raise ValueError("The secret of the worker service is empty; set one of at least 16 bytes.")
            self.skew, self.remembers = security.clock_skew_seconds, security.remember_nonces
            self.by_id[security.key] = [SharedKey(security.key, security.secret)]

    def _take_options(self, config: Mapping[str, Any]) -> None:
        if config.get("type", "signed") != self.mode:
            raise ValueError(f"{_LABEL}.type must be 'signed' with keys and secret_file.")
        remedy = "leave the key out for the default"
        skew, remembers = config.get("clock_skew_seconds", 300.0), config.get("remember_nonces", True)
        self.skew = seconds()(f"{_LABEL}.clock_skew_seconds", skew, remedy)
        self.remembers = flag(f"{_LABEL}.remember_nonces", remembers, remedy)

    def _take_secrets(self, config: Mapping[str, Any]) -> None:
        entries = config.get("keys", [config])
        if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
            raise TypeError(f"{_LABEL}.keys must be a list of dictionaries, each with a key and its secret.")
        if not entries:
            raise ValueError(f"{_LABEL}.keys is empty: nobody could connect.")
        for position, entry in enumerate(entries):
            label = f"{_LABEL}.keys[{position}]" if "keys" in config else _LABEL
            if "keys" in config:
                _check_names(entry, {"key", *_SECRETS}, label)
                if not entry.get("key"):
                    raise ValueError(f"{label} must have a key, its name.")
            key_id = str(entry.get("key", "default"))
            if entry.get("secret") is None and entry.get("secret_env") is None and "secret_file" in entry:
                self.files.append(str(entry["secret_file"]))
            self.by_id.setdefault(key_id, []).append(SharedKey(key_id, read_secret(entry, label)))

    def _take_key_pairs(self, config: Mapping[str, Any]) -> None:
        hosts, own = config.get("hosts"), config.get("private_key_file")
        if not isinstance(hosts, Mapping) or not hosts:
            raise ValueError(
                f"{_LABEL}.hosts must be a dictionary: each host's name, and the PEM file of its public key, "
                "or a list of such files."
            )
        if not own:
            raise ValueError(f"{_LABEL}.private_key_file must be the PEM file of this service's private key.")
        self.files.append(str(own))
        private = private_key(str(own), f"{_LABEL}.private_key_file")
        for key_id, paths in hosts.items():
            for path in paths if isinstance(paths, list) else [paths]:
                self.files.append(str(path))
                public = public_key(str(path), f"{_LABEL}.hosts.{key_id}")
                self.by_id.setdefault(str(key_id), []).append(KeyPair(str(key_id), private, public))


def _check_names(config: Mapping[str, Any], known: set[str], label: str = _LABEL) -> None:
    for name in config:
        if name not in known:
            raise ValueError(f"{label} has no key {show(name)}. {unknown(name, known)}")


class Keyring:
    """The keys in force. Thread-safe. Raises what :class:`Keys` raises for the first version."""

    def __init__(self, config: Any) -> None:
        self._config = config
        # What was there before it was read: a change in between is another one.
        self._seen = _look(Keys(config).files)
        self._keys = Keys(config)
        self._fault = ""
        self._look_at = 0.0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Keyring {self._keys.mode}>"

    def keys(self) -> Keys:
        """Return the keys, read again if a file that they are from has changed."""
        if self._keys.files and time.monotonic() >= self._look_at:
            with self._lock:
                self._look_at = time.monotonic() + _LOOK_EVERY
                seen = _look(self._keys.files)
                if seen != self._seen or self._fault:
                    self._read_again()
        return self._keys

    def _read_again(self) -> None:
        """Take over what is there now; what cannot be used is tried again at each look, and told once."""
        try:
            seen = _look(Keys(self._config).files)
            keys = Keys(self._config)
            if keys.mode != self._keys.mode:
                raise ValueError(f"the type changed from {self._keys.mode!r}, which needs a restart.")
        except (OSError, RuntimeError, ValueError, TypeError) as exc:
            if str(exc) != self._fault:
                self._fault = str(exc)
                _logger.error("The keys of hosts stay as they were: %s", exc)
        else:
            self._keys, self._seen, self._fault = keys, seen, ""
            _logger.info("The keys of hosts were read again: %s.", ", ".join(sorted(keys.by_id)) or keys.mode)


def _look(files: list[str]) -> list[tuple[int, int, int, int] | None]:
    """Return what shows that a file is another one than before."""
    seen: list[tuple[int, int, int, int] | None] = []
    for path in files:
        try:
            status = os.stat(path)
        except OSError:
            seen.append(None)
        else:
            seen.append((status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino))
    return seen
