"""The server's configuration: defaults that are safe, and refusals that name the key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlsys.errors import ConfigError
from rlsys.serve.config import ServeConfig
from rlsys.serve.load import load_serve_config
from tests.unit.docs import pages
from tests.unit.docs.pages import ROOT

ONE: dict[str, Any] = {"models": {"m": "x"}}


def test_a_model_alone_is_served_on_loopback_with_keys() -> None:
    config = load_serve_config(None, [], ONE)
    assert (config.bind.host, config.bind.port, config.bind.is_loopback) == ("127.0.0.1", 8000, True)
    assert config.keys is not None and config.keys.endswith(".config/rlsys/serve-keys")
    assert config.models["m"].path == "x" and config.models["m"].aliases == []


def test_overrides_win_over_the_file_and_options_over_it(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("models: {m: {path: x, aliases: [a, b]}}\nbind: {port: 1, host: localhost}\n")
    config = load_serve_config(file, ["limits.models=3"], {"bind": {"port": 2}})
    assert (config.bind.port, config.bind.host, config.limits.models) == (2, "localhost", 3)
    assert config.models["m"].aliases == ["a", "b"]


REFUSED = {
    "no model": ([], {}, "models: found none; give --model"),
    "key": (["bind.prt=1"], ONE, "bind.prt is no key of 'bind'; did you mean 'port'"),
    "limit": (["limits.num_samples=0"], ONE, "limits.num_samples: found 0; input should be greater than"),
    "open address": (["bind.host=0.0.0.0"], ONE, "without TLS: keys would travel readable"),
    "open address by name": (["bind.host=example.com"], ONE, "behind_tls_proxy=true if a proxy encrypts"),
    "no keys on an open address": (
        ["bind.host=::", "bind.behind_tls_proxy=true", "keys=null"],
        ONE,
        "keys: found none",
    ),
    "no keys behind a proxy": (["bind.behind_tls_proxy=true", "keys=null"], ONE, "a proxy (bind.behind_tls_proxy)"),
    "proxy by name": (["bind.proxies=[proxy.example]"], ONE, "found 'proxy.example'; wanted an address or a network"),
    "any proxy": (["bind.proxies=['*']"], ONE, "found '*'; wanted an address or a network"),
    "every address": (["bind.host=''"], ONE, "without TLS: keys would travel readable"),
    "mapped address": (["bind.host='::ffff:0.0.0.0'"], ONE, "without TLS: keys would travel readable"),
    "half of TLS": (["bind.tls_key=x"], ONE, "found one of them; wanted both or neither"),
    "alias twice": (
        [],
        {"models": {"a": "x", "b": {"path": "y", "aliases": ["a"]}}},
        "found the name or alias 'a' twice",
    ),
    "models elsewhere": (["deployment.models={a: x}"], ONE, "belongs to `models` of the server"),
    "held too long": (["limits.poll_s=50"], ONE, "limits.poll_s: found 50"),
}


@pytest.mark.parametrize(("overrides", "base", "message"), REFUSED.values(), ids=REFUSED)
def test_a_configuration_that_is_wrong_or_unsafe_is_refused(
    overrides: list[str], base: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_serve_config(None, overrides, base)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1"])
def test_loopback_needs_neither_tls_nor_keys(host: str) -> None:
    assert load_serve_config(None, [f"bind.host='{host}'", "keys=null"], ONE).keys is None


def test_the_configuration_of_the_docs_is_one() -> None:
    (text,) = pages.blocks(ROOT / "docs" / "serve.md", "yaml")
    config = ServeConfig.model_validate(yaml.safe_load(text))
    assert config.models["Qwen/Qwen3-8B"].aliases == ["Qwen/Qwen3-8B-Base"]
    assert config.deployment.sampler is not None and config.deployment.sampler.num_workers == 2


def test_deployments_get_the_servers_checkpoints_folder() -> None:
    config = load_serve_config(None, ["checkpoints=here", "deployment.max_length=64"], ONE)
    assert config.service_config().checkpoints == str(Path("here").absolute())
    assert config.service_config().max_length == 64
