"""Claims about a Ray cluster that a job cannot join: absent, refusing and has another version are told apart."""

from __future__ import annotations

import socket

import pytest
from ray._private.authentication import authentication_constants as messages
from ray.exceptions import AuthenticationError

from actors.cluster.joined_address import joined_address
from actors.cluster.local_ray import why_not_started
from actors.cluster.ray_cluster import cluster, why_not_joined
from rlsys.config import ClusterSection
from rlsys.errors import ClusterError

WHERE = "'10.0.0.1:6379' (cluster.address or RAY_ADDRESS)"


@pytest.mark.parametrize(
    "error",
    [
        AuthenticationError(messages.TOKEN_AUTH_ENABLED_BUT_NO_TOKEN_FOUND_ERROR_MESSAGE),
        RuntimeError(messages.TOKEN_INVALID_ERROR_MESSAGE),
        RuntimeError("GCS: Unauthenticated: InvalidAuthToken: missing"),
    ],
)
def test_a_refused_token_is_not_told_as_a_cluster_that_is_absent(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    said = why_not_joined(WHERE, error)
    assert "refuses this process's token" in said and "RAY_AUTH_MODE is not set here" in said
    assert (
        "For more information" not in said
        and "disabled" in said
        and "RAY_AUTH_TOKEN" in said
        and "ray start" not in said
    )


def test_a_refusal_that_is_the_cause_of_another_error_is_found() -> None:
    error = ConnectionError("Could not connect")
    error.__cause__ = AuthenticationError("no token")
    error.__cause__.__cause__ = RuntimeError(messages.TOKEN_INVALID_ERROR_MESSAGE)
    assert "refuses this process's token" in why_not_joined(WHERE, error)


def test_another_version_is_told_with_both() -> None:
    said = why_not_joined(
        WHERE, RuntimeError("Version mismatch: The cluster was started with:\n Ray: 2.1\n here: 2.60")
    )
    assert "has another version" in said and "2.1" in said and "2.60" in said and "\n" not in said


def test_an_answer_that_is_none_names_port_tls_and_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_USE_TLS", "1")
    said = why_not_joined(WHERE, RuntimeError("Failed to connect to GCS"))
    assert "6379" in said and "RAY_USE_TLS is '1' here" in said and "RAY_AUTH_MODE" in said


def test_no_cluster_at_auto_is_told_as_absent() -> None:
    error = ConnectionError("Could not find any running Ray instance. Please specify the one to connect to")
    assert "ray start --head" in why_not_joined("'auto'", error)


def test_a_port_where_nobody_listens_is_told_as_absent() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with pytest.raises(ClusterError, match="no Ray cluster answers"), cluster(ClusterSection(address=address)):
        pass


def test_a_ray_that_does_not_start_here_is_an_error_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with (
        pytest.raises(ClusterError, match=r"^Ray did not start on this machine: .*object store.*; Ray's logs are in"),
        cluster(ClusterSection(object_store_gb=1e5)),
    ):
        pass


def test_a_ray_that_is_late_is_told_to_start_again() -> None:
    late = Exception("The current node timed out during startup. This could happen because ...")
    assert "timed out during startup; on a loaded machine" in why_not_started(late)


@pytest.mark.parametrize(
    ("given", "variable", "joined"),
    [
        (None, "", None),
        (None, "local", None),
        ("local", "head:6379", None),
        (None, "head:6379", "head:6379"),
        ("auto", "head:6379", "auto"),
    ],
)
def test_local_starts_ray_here_and_a_configuration_comes_before_ray_address(
    monkeypatch: pytest.MonkeyPatch, given: str | None, variable: str, joined: str | None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", variable)
    assert joined_address(given) == joined
