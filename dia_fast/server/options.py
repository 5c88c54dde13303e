"""Options of the operator of a server, checked."""

import ipaddress
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from dia_fast.checkpoint.demo import DEMO
from dia_fast.engine import MAX_BATCH
from dia_fast.errors import InputError
from dia_fast.utils.files import LARGEST_TEXT, read_regular

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class Options:
    """Options of `dia-fast serve`; `dia-fast serve --help` explains each.

    Args:
        served_name: Id of the model in `/v1/models`.
        demo: Whether the model is the demo voice, which knows few words.
        keys: Accepted API keys; none of them means that every request is served.
        max_body: Largest request body in bytes.
        request_timeout: Seconds until the first byte of sound.
        slow_seconds: Most seconds of sound that are made ahead of a reader.
        started: Unix time, in seconds, from which the models and the voices of every server are; all replicas tell it.

    Raises:
        InputError: A combination that cannot work or is not safe.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_name: str = DEMO
    demo: bool = False
    voices: Path | None = None
    max_batch: int = MAX_BATCH
    max_queue: int = 64
    request_timeout: float = 300.0
    keys: tuple[str, ...] = field(default=(), repr=False)
    no_auth: bool = False
    cors_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    page: bool = True
    uploads: bool = False
    max_body: int = 25_000_000
    drain_seconds: float = 30.0
    drain_delay: float = 0.0
    log_format: str = "text"
    log_text: bool = False
    preload: tuple[str, ...] = ()
    compat: bool = False
    slow_seconds: float = 10.0
    started: int = field(default_factory=lambda: int(time.time()), compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65_535:
            raise InputError(f"port must be from 0 to 65535, not {self.port}; 0 takes a free one")
        if self.max_queue < 0:
            raise InputError(f"max_queue must be 0 or more, not {self.max_queue}")
        if self.max_body < 1024:
            raise InputError(f"max_body must be at least 1024 bytes, not {self.max_body}")
        for name in ("request_timeout", "drain_seconds", "drain_delay"):
            if not 0 <= getattr(self, name) < 86_400:
                raise InputError(f"{name} must be from 0 to 86400 seconds, not {getattr(self, name)}")
        if any(not key.strip() or not key.isascii() for key in self.keys):
            raise InputError("api_key must be ASCII and not empty")
        if not self.loopback and not self.keys and not self.no_auth:
            raise InputError(
                f"host {self.host} can be reached by others, and there is no key: set DIA_FAST_API_KEY, or --api-key, "
                "or say --no-auth if everybody may use this server"
            )
        if self.uploads and self.voices is None:
            raise InputError("uploads need a folder to keep them: add --voices FOLDER")

    @property
    def loopback(self) -> bool:
        """True if only this machine can reach the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"


def read_keys(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Read API keys from a file, one a line; empty lines and lines that begin with # are skipped.

    Raises:
        InputError: The file cannot be read or holds no key.
    """
    try:
        lines = read_regular(Path(path), LARGEST_TEXT).decode("ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"api_key_file {path}: cannot be read: {error}") from error
    keys = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not keys:
        raise InputError(f"api_key_file {path}: holds no key")
    return keys
