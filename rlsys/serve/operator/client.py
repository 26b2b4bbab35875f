"""Asks a running server for its status."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlsys.errors import ConfigError
from rlsys.serve.config import is_loopback
from rlsys.serve.load import load_serve_config
from rlsys.serve.operator.guard import token_of

WAIT_S = 30.0
TOKEN = "RLSYS_OPERATOR_TOKEN"


def status_of(server: str | Path | None, overrides: Sequence[str], base: Mapping[str, Any]) -> dict[str, Any]:
    """Status of a running server. `server`: its operator's address, or its YAML; None: the default address.

    Raises:
        ConfigError: as `fetch_status`; or the YAML says that it has no operator's side, or no certain port.
    """
    if isinstance(server, str):
        return fetch_status(server, os.environ.get(TOKEN))
    models = {} if server is not None or base.get("models") else {"models": {"none": "none"}}
    config = load_serve_config(server, overrides, {**base, **models})
    port = config.operator.port_beside(config.bind.port)
    if not (config.operator.enabled and port):
        raise ConfigError(
            "--status: this configuration has no operator's port; give the address that the server printed"
        )
    host = config.operator.host
    scheme = "http" if is_loopback(host) or config.bind.tls_certificate is None else "https"
    address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
    return fetch_status(address, token_of(config.operator) or os.environ.get(TOKEN))


def fetch_status(url: str, token: str | None) -> dict[str, Any]:  # Any: JSON
    """What `/status.json` of the operator's side at `url` says.

    Raises:
        ConfigError: nothing answers there, or not as the operator's side.
    """
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/status.json", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the operator's side is no web site
        with opener.open(request, timeout=WAIT_S) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        hint = "; it wants the token of operator.token_file in RLSYS_OPERATOR_TOKEN" if error.code == 401 else ""
        raise ConfigError(f"--status: {url} answered {error.code}{hint}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--status: {url}: {error}; wanted the operator's address, which `rlsys serve` prints when it starts"
        ) from None
    if not isinstance(found, dict) or "bases" not in found:
        raise ConfigError(f"--status: {url}: is not the operator's side of rlsys serve")
    return found
