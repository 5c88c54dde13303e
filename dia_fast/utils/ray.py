"""A Ray cluster: connected to, or started on this machine and ended again."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from dia_fast.errors import InputError

EXTRA = 'Ray is not installed: pip install "dia-fast[ray]"'
_CONNECT_SECONDS = 12.0


@contextmanager
def cluster(address: str) -> Iterator[Any]:
    """Ray, connected; disconnected afterwards, and a cluster that was started here is ended."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise InputError(EXTRA) from error
    if ray.is_initialized():
        raise InputError("this process is connected to a Ray cluster already")
    if address != "local":
        check_address(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address=address, **quiet)
    except Exception as error:
        raise InputError(f"cannot use the Ray cluster at {address}: {first_line(error)}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """See that a cluster answers, within 15 s, since `ray.init` may wait for minutes.

    Raises:
        InputError: None does, with what to try.
    """
    advice = 'start one with "ray start --head", name another address, or use "local"'
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not host or not port.isdigit():
            raise InputError(f'--ray takes HOST:PORT, ray://HOST:PORT, "auto" or "local", not {address!r}')
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except (OSError, OverflowError) as error:
            raise InputError(f"no Ray cluster answers at {address} ({error}): {advice}") from error
    silent = f"what answers at {address} is no Ray cluster, or does not respond: {advice}"
    if address.startswith("ray://"):
        if not _serves_clients(f"{host}:{port}"):
            raise InputError(silent)
        return
    found = _health(address, os.environ, silent)
    if _asks_for_a_token(found):
        # Ray takes the token of its default place for a cluster that it finds by itself, its health check does not.
        if address == "auto" and "RAY_AUTH_MODE" not in os.environ:
            found = _health(address, os.environ | {"RAY_AUTH_MODE": "token"}, silent)
        if _asks_for_a_token(found):
            raise InputError(
                f"the Ray cluster at {address} asks for a token: set RAY_AUTH_MODE=token, and give Ray the cluster's "
                "token in RAY_AUTH_TOKEN, in a file named by RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token"
            )
    if found.returncode:
        last = (found.stderr.strip() or found.stdout.strip() or "no answer").splitlines()[-1]
        raise InputError(f"no Ray cluster answers at {address} ({last}): {advice}")


def _health(address: str, environment: Mapping[str, str], silent: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from ray.scripts.scripts import main; main()", "health-check"]
    if address != "auto":
        command += ["--address", address]
    try:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_CONNECT_SECONDS)
    except subprocess.TimeoutExpired:
        raise InputError(silent) from None


def _asks_for_a_token(found: "subprocess.CompletedProcess[str]") -> bool:
    return bool(found.returncode) and "AuthenticationError" in found.stderr


def _serves_clients(target: str) -> bool:
    """Tell if gRPC is spoken at an address, which Ray's client takes half a minute to find out."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return True  # with certificates that are Ray's affair
    import grpc

    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(_CONNECT_SECONDS - 2)
        except grpc.FutureTimeoutError:
            return False
    return True


def first_line(error: Exception) -> str:
    """The first line of an error that Ray has written many of."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
