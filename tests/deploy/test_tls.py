"""TLS by one value, on the nodes of the Kubernetes file, with a CA and certificates made here."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.deploy.sites import Site, entry, load, new_token, readme_line
from tests.deploy.test_entry_commands import CONNECT, stop


def test_with_one_value_changed_only_those_with_a_certificate_get_in(site: Callable[..., Site]) -> None:
    here = site(RAY_AUTH_TOKEN=new_token(), FQ_RAY_IP="127.0.0.1")
    here.do(readme_line("openssl req -x509"))
    on = container_env() | {"RAY_USE_TLS": "1", "RLSYS_DASHBOARD_HOST": "127.0.0.1"}  # the latter: this is no pod
    head, worker = (placed(on, here, node) for node in ("head", "worker"))
    here.start(entry("kuberay-cluster.yaml").head, "head", **head)
    here.start(entry("kuberay-cluster.yaml").worker, "worker", **worker)
    here.await_nodes(2, **head)

    foreign = here.folder / "foreign"
    here.do(readme_line("openssl req -x509").replace("~/.ray/tls", str(foreign)))
    names = {"RAY_USE_TLS": "1", "RLSYS_TLS_DIR": str(foreign)}
    here.do("deploy/node.sh certificate", "foreign", **names)
    strangers = [here.begin(CONNECT, "plain", RAY_USE_TLS="0"), here.begin(CONNECT, "foreign", **names)]
    began = time.monotonic()
    friend = here.begin(CONNECT, "friend", **head)
    assert here.exit_code(friend) == 0, here.said()
    # A refused client was seen to knock for more than a minute: three times as long as the other took is long enough.
    end = time.monotonic() + max(10.0, 2 * (time.monotonic() - began))
    assert [left(stranger, end) for stranger in strangers] == [False, False]
    let_in = {log.stem for log in here.folder.glob("*.log") if "let in" in log.read_text()}
    assert let_in == {"friend"}
    for stranger in strangers:
        stranger.kill()
    stop(here)


def test_a_node_without_certificates_says_what_is_missing(site: Callable[..., Site]) -> None:
    here = site(RAY_AUTH_TOKEN=new_token())
    refused = here.run("deploy/node.sh head", RAY_USE_TLS="1")
    assert refused.returncode == 1
    assert f"{here.home}/.ray/tls/ca.crt does not exist" in refused.stdout
    assert "ca.key to create the certificate" in refused.stdout


def test_a_certificate_names_the_node_and_is_made_again_only_when_it_does_not_fit(site: Callable[..., Site]) -> None:
    here = site()
    here.do(readme_line("openssl req -x509"))
    here.do("deploy/certificate.sh head.of.the.pods", RAY_USE_TLS="1")
    (made,) = (here.home / ".ray" / "tls").glob("[!c]*.crt")
    text = here.do(f"openssl x509 -in {made} -noout -text")
    assert here.address in text and "head.of.the.pods" in text and "IP Address:127.0.0.1" in text
    first = made.read_bytes()
    here.do("deploy/certificate.sh", RAY_USE_TLS="1")
    assert made.read_bytes() == first
    here.do(readme_line("openssl req -x509"))  # another CA
    here.do("deploy/certificate.sh", RAY_USE_TLS="1")
    assert made.read_bytes() != first
    assert made.with_suffix(".key").stat().st_mode & 0o077 == 0


def container_env() -> dict[str, str]:
    """The environment of the head's container in the file; TLS is off there."""
    group = load("kuberay-cluster.yaml")["spec"]["headGroupSpec"]
    env = {each["name"]: each["value"] for each in group["template"]["spec"]["containers"][0]["env"]}
    assert env["RAY_USE_TLS"] == "0"
    return env


def placed(env: dict[str, str], here: Site, node: str) -> dict[str, str]:
    """The container's paths, in folders of this site."""
    mounts = {"/ca/": f"{here.home}/.ray/tls/", "/tls/": f"{here.folder}/{node}/"}
    moved = dict(env)
    for name, value in env.items():
        for mount, folder in mounts.items():
            if value.startswith(mount):
                moved[name] = str(Path(folder) / value.removeprefix(mount))
    return moved


def left(process: subprocess.Popen[str], end: float) -> bool:
    """Whether it ended well, within the time."""
    try:
        return process.wait(max(0.1, end - time.monotonic())) == 0
    except subprocess.TimeoutExpired:
        return False
