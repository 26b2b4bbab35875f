"""Configuration of `rlsys serve`: one YAML, or a model and defaults."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rlsys.client.config import ServiceConfig
from rlsys.config import Section
from rlsys.config.key_types import PathText, Seconds

PORTS_APART = 1000  # of a server and its operator's side, by default


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Limits(Section):
    """Limits of one server. Each is named in the answer that refuses a request."""

    body_bytes: int = Field(64 * 2**20, ge=1024)  # of forward and forward_backward
    call_bytes: int = Field(8 * 2**20, ge=1024)  # of every other body
    held_bytes: int = Field(512 * 2**20, ge=1024)  # bodies in memory per tenant; beyond: 429
    header_bytes: int = Field(32 * 2**10, ge=1024)  # all headers of one request
    decompressed_bytes: int = Field(64 * 2**20, ge=1024)
    datums: int = Field(4096, ge=1)  # per request
    num_samples: int = Field(1024, ge=1)  # per request
    stop_strings: int = Field(64, ge=0)
    stop_string_chars: int = Field(256, ge=1)
    topk_prompt_logprobs: int = Field(20, ge=0, le=20)  # 20 is vLLM's
    metadata_bytes: int = Field(64 * 1024, ge=0)  # user_metadata of one object, as JSON
    samples_in_flight: int = Field(4000, ge=1)  # completions per tenant; beyond: 429, and the client slows down
    models: int = Field(64, ge=1)  # per tenant
    queued_calls: int = Field(4096, ge=1)  # of models, that wait or run, per tenant; beyond: 429
    resident_models: int = Field(256, ge=1)  # on the learner of one base; beyond, the longest idle is parked on disk
    idle_model_s: Seconds = 1800.0  # a model without a request for this long is parked on disk until its next call
    samplers: int = Field(512, ge=1)  # per tenant; the oldest idle unnamed one is released first
    sessions: int = Field(1024, ge=1)  # per tenant
    result_bytes: int = Field(2**30, ge=2**20)  # kept results, in all
    result_s: Seconds = 300.0  # a result is kept for this long after its last poll
    undelivered_s: Seconds = 3600.0  # ... and this long if nobody has asked for it
    session_s: Seconds = 600.0  # a session without any request for this long is finished
    ended_session_s: Seconds = 3600.0  # an ended session is listed, and its late requests are told why, for this long
    poll_s: float = Field(35.0, gt=0, le=40.0)  # how long retrieve_future waits; clients wait 45 s
    gap_s: Seconds = 330.0  # clients repeat a lost call for 300 s
    recover_s: Seconds = 300.0  # how long a sample request waits while a dead sampler is replaced
    slow_header_s: Seconds = 30.0  # from the connection, or a request's first byte, to the end of its headers
    slow_body_s: Seconds = 60.0
    slow_read_s: Seconds = 60.0  # how long a client may read nothing of an answer
    connections: int = Field(8192, ge=1)
    connections_per_address: int = Field(4096, ge=1)  # a client with 2,000 requests in flight has as many
    failed_keys: int = Field(30, ge=1)  # wrong keys per minute and client address; beyond: 429 for wrong keys
    failed_keys_in_all: int = Field(1000, ge=1)  # ... of all addresses
    openai_snapshots: int = Field(8, ge=1)  # checkpoints per tenant that /v1 keeps open; the oldest idle one goes first
    openai_snapshot_idle_s: Seconds = 300.0  # ... and releases after this long without a request


class ServedModel(Section):
    """A base model. Clients load its tokenizer by the name under which they asked for the model."""

    path: PathText  # folder, or hub name
    aliases: list[str] = Field(default_factory=list)
    tokenizer: str | None = None  # hub name that clients load instead


class Bind(Section):
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)  # 0: any free one
    tls_certificate: PathText | None = None
    tls_key: PathText | None = None
    behind_tls_proxy: bool = False  # a proxy on the way encrypts: allows another address than loopback without TLS
    # addresses or networks of that proxy, whose X-Forwarded-For and -Proto are believed
    proxies: list[str] = Field(default_factory=lambda: ["127.0.0.1", "::1"])

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    @field_validator("proxies")
    @classmethod
    def _are_addresses(cls, value: list[str]) -> list[str]:
        for each in value:
            try:
                ipaddress.ip_network(each)
            except ValueError:
                raise ValueError(f"found {each!r}; wanted an address or a network, such as 10.0.0.0/8") from None
        return value

    @model_validator(mode="after")
    def _both_files(self) -> Bind:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key: found one of them; wanted both or neither")
        if not (self.is_loopback or self.tls_certificate or self.behind_tls_proxy):
            raise ValueError(
                f"host: found {self.host}, which others can reach, without TLS: keys would travel readable. Set "
                "tls_certificate and tls_key (--tls-certificate and --tls-key), or behind_tls_proxy=true if a proxy "
                "encrypts"
            )
        return self


class LogSection(Section):
    """Access lines: one per slow or failed request, on stderr."""

    slow_s: Seconds = 5.0  # a request that takes longer is told; polls for results are not
    json_lines: bool = False


class OperatorSection(Section):
    """Address of metrics, health and status page. Clients' keys do not open it."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int | None = Field(None, ge=0, le=65535)  # None: bind.port + 1000; 0: any free one
    token_file: PathText | None = None  # its first line is the token that requests carry; needed beyond loopback

    @model_validator(mode="after")
    def _guarded(self) -> OperatorSection:
        if self.token_file is None and not is_loopback(self.host):
            raise ValueError(
                f"host: found {self.host}, which others can reach, without operator.token_file; name a file with a "
                "token, which requests carry as `Authorization: Bearer TOKEN`"
            )
        return self

    def port_beside(self, port: int) -> int:
        """The port beside a server on `port`."""
        if self.port is not None:
            return self.port
        return port + PORTS_APART if 0 < port <= 65535 - PORTS_APART else 0


def _as_models(value: object) -> object:
    if isinstance(value, dict):
        return {name: {"path": each} if isinstance(each, str) else each for name, each in value.items()}
    return value


class ServeConfig(Section):
    """Configuration of one HTTP server and the deployments behind it."""

    models: Annotated[dict[str, ServedModel], BeforeValidator(_as_models)] = Field(min_length=1)  # name -> model
    bind: Bind = Bind()
    keys: PathText | None = (
        "~/.config/rlsys/serve-keys"  # file with `key tenant` lines, or env:NAME; None: no keys, on loopback only
    )
    checkpoints: PathText = "checkpoints"  # folder that this server and the learner's node share
    limits: Limits = Limits()
    log: LogSection = LogSection()
    operator: OperatorSection = OperatorSection()
    deployment: ServiceConfig = ServiceConfig()  # learner, samplers, dtype, cluster; its models are those above

    @model_validator(mode="after")
    def _consistent(self) -> ServeConfig:
        if self.keys is None and not self.bind.is_loopback:
            raise ValueError(
                f"keys: found none, and bind.host {self.bind.host} can be reached from elsewhere; name a file of keys"
            )
        if self.keys is None and self.bind.behind_tls_proxy:
            raise ValueError("keys: found none, and a proxy (bind.behind_tls_proxy) serves others; name a file of keys")
        if not (is_loopback(self.operator.host) or self.bind.tls_certificate or self.bind.behind_tls_proxy):
            raise ValueError(
                f"operator.host: found {self.operator.host}, which others can reach, without TLS: its token would "
                "travel readable. Set bind.tls_certificate and bind.tls_key, or bind.behind_tls_proxy=true"
            )
        if self.deployment.models:
            raise ValueError("deployment.models: belongs to `models` of the server")
        seen: set[str] = set()
        for name, model in self.models.items():
            for each in (name, *model.aliases):
                if each in seen:
                    raise ValueError(f"models: found the name or alias {each!r} twice")
                seen.add(each)
        return self

    def service_config(self) -> ServiceConfig:
        """Configuration of the deployments."""
        return self.deployment.model_copy(update={"checkpoints": str(Path(self.checkpoints).absolute())})
