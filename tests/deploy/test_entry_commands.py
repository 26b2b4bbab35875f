"""The commands of each file under deploy/, read out of it and executed: nodes, a job, and the end."""

from __future__ import annotations

import json
import re
import shlex
import signal
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config

from rlsys.config import JobConfig, dump_config
from rlsys.run_state.jsonl import read_metrics
from tests.deploy.sites import DEPLOY, ROOT, Site, entry, load, new_token, readme_line, readme_start
from tests.serve.conftest import configure
from tests.serve.tiny_base import make as make_base

ALL = ["ray-aws.yaml", "ray-gcp.yaml", "ray-onprem.yaml", "kuberay-cluster.yaml", "kuberay-job.yaml"]
CONNECT = "bash -c 'source deploy/env.sh && exec python tests/deploy/connect.py'"


@pytest.mark.soak
@pytest.mark.parametrize("name", [*ALL, "Dockerfile.cpu", "Dockerfile.gpu"])
def test_head_and_worker_commands_of_each_file_make_a_cluster_that_stops(name: str, site: Callable[..., Site]) -> None:
    here = site(RAY_AUTH_TOKEN=new_token(), FQ_RAY_IP="127.0.0.1")  # both by KubeRay, the first by `docker run --env`
    write_bootstrap_config(here)
    here.start(entry(name).head, "head")
    here.start(entry(name).worker, "worker")
    here.await_nodes(2)
    stop(here)


@pytest.mark.soak
def test_a_job_submitted_to_the_launchers_nodes_trains_and_strangers_are_refused(
    site: Callable[..., Site], job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    here = site()
    token = here.make_token()
    write_bootstrap_config(here)
    here.start(entry("ray-onprem.yaml").head, "head")
    here.start(entry("ray-aws.yaml").worker, "worker")
    here.await_nodes(2)
    assert [http_status(here, each) for each in ("", new_token(), token)] == [401, 403, 200]
    # Ray knocks for 20 s with a wrong token, so this one goes on beside the job.
    stranger = here.begin(CONNECT, "stranger", RAY_AUTH_TOKEN=new_token())
    command, address, config, _runs = shlex.split(readme_line("deploy/submit.sh http"))
    assert (address, config) == ("http://127.0.0.1:8265", "configs/quickstart.yaml")
    submitted = shlex.join([command, here.url, write_job(job, tmp_path), f"run.dir={tmp_path}"])
    done = here.run(submitted)
    assert done.returncode == 0 and "succeeded" in done.stdout, here.said(done.stdout)
    assert trained_steps(tmp_path) == [1]
    assert here.exit_code(stranger) != 0 and "let in" not in here.said()
    stop(here)


@pytest.mark.soak
def test_the_service_starts_on_a_running_cluster_answers_and_stops(site: Callable[..., Site], tmp_path: Path) -> None:
    here = site(RAY_AUTH_TOKEN=new_token())
    here.start(entry("ray-onprem.yaml").head, "head")
    here.await_nodes(1)
    make_base(tmp_path / "models" / "base")
    config = configure(tmp_path, str(tmp_path / "models" / "base"), {"address": "auto"})
    start, end = readme_start("on the head").strip("`"), "deploy/serve.sh stop"
    said = here.do(start.replace("serve.yaml", str(config)), "head")
    url = re.search(r"TINKER_BASE_URL=(\S+)", said)
    assert url and urllib.request.urlopen(f"{url[1]}/api/v1/healthz", timeout=300).status == 200
    assert "serves already" in here.run(start.replace("serve.yaml", str(config)), "head").stdout
    assert here.do(end, "head").rstrip().endswith("stopped")
    assert "no server" in here.do(end, "head")
    stop(here)


@pytest.mark.soak
def test_the_rayjobs_entrypoint_trains(
    site: Callable[..., Site], job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    here = site(RAY_AUTH_TOKEN=new_token())
    spec = load("kuberay-job.yaml")["spec"]
    here.start(entry("kuberay-job.yaml").head, "head")
    here.start(entry("kuberay-job.yaml").worker, "worker")
    here.await_nodes(2)
    env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert set(env) == {"RLSYS_CONFIG", "RLSYS_RUNS"}
    env = json.dumps({"env_vars": {"RLSYS_CONFIG": write_job(job, tmp_path), "RLSYS_RUNS": str(tmp_path)}})
    submitted = f"ray job submit --address {here.url} --runtime-env-json {shlex.quote(env)} -- "
    # KubeRay splits the entrypoint into words, as a shell does without expanding anything.
    done = here.run(submitted + shlex.join(spec["entrypoint"].split()), RAY_AUTH_MODE="token")
    assert done.returncode == 0, here.said(done.stdout)
    assert trained_steps(tmp_path) == [1]
    stop(here)


@pytest.mark.soak
def test_the_slurm_script_starts_nodes_trains_and_ends_them(
    site: Callable[..., Site], job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    here = slurm(site)
    done = here.run(slurm_command(job, tmp_path))
    assert done.returncode == 0 and "2 nodes are up" in done.stdout, done.stdout
    assert trained_steps(tmp_path) == [1]
    here.until_gone()


@pytest.mark.soak
def test_a_cancelled_slurm_job_leaves_nothing_behind(
    site: Callable[..., Site], job: Callable[..., JobConfig], tmp_path: Path
) -> None:
    here = slurm(site)
    script = here.begin(slurm_command(job, tmp_path))
    here.await_nodes(2)
    script.send_signal(signal.SIGTERM)  # what `scancel --batch` sends
    assert here.exit_code(script) == 143
    here.until_gone()


def test_what_make_test_starts_stands_for_every_file() -> None:
    bare = [command.replace("~/rlsys/deploy/node.sh", "rlsys-node") for command in entry("ray-onprem.yaml").head]
    assert entry("ray-gcp.yaml") == entry("ray-aws.yaml") and bare == entry("ray-aws.yaml").head
    assert entry("kuberay-job.yaml") == entry("kuberay-cluster.yaml")
    assert entry("Dockerfile.gpu") == entry("Dockerfile.cpu")
    assert entry("Dockerfile.cpu").head == entry("kuberay-cluster.yaml").head[1:]


def stop(here: Site) -> None:
    """As README says: by node.sh where that started the node, by a signal where a container or step holds it."""
    assert "deploy/node.sh stop" in (DEPLOY / "README.md").read_text()
    for node in ("worker", "head"):
        here.do("deploy/node.sh stop", node)
    for process in here.blocking:
        process.send_signal(signal.SIGTERM)
    here.until_gone()


def write_bootstrap_config(here: Site) -> None:
    """What `ray up` leaves on a head for its autoscaler: here no node that it could start."""
    config = prepare_config(
        {"cluster_name": "x", "provider": {"type": "local", "head_ip": here.address, "worker_ips": []}}
    )
    (here.home / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(config))


def http_status(here: Site, token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{here.url}/api/jobs/", headers=headers), timeout=300
        ) as got:
            return int(got.status)
    except urllib.error.HTTPError as error:
        return error.code


def write_job(job: Callable[..., JobConfig], tmp_path: Path) -> str:
    (tmp_path / "job.yaml").write_text(dump_config(job("rl.steps=1")))
    return str(tmp_path / "job.yaml")


def trained_steps(tmp_path: Path) -> list[int]:
    return [line["step"] for line in read_metrics(tmp_path / "micro") if "reward/mean" in line]


def slurm(site: Callable[..., Site]) -> Site:
    """A site where `srun` and `scontrol` are stand-ins that see two nodes in this machine."""
    here = site()
    here.make_token()
    here.more |= {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[0-1]",
        "SLURM_CPUS_ON_NODE": "2",
        "RLSYS_RAY_OPTIONS": f"--object-store-memory={150 * 2**20}",
        "RLSYS_TEST_FOLDER": str(here.folder),
    }
    for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (here.bin / name).write_text(text)
        (here.bin / name).chmod(0o755)
    return here


SCONTROL = """#!/usr/bin/env bash
[ "$*" = "show hostnames n[0-1]" ] && printf 'n0\\nn1\\n'
"""

# Takes slurm.sh's options, refuses others, and runs the command with the folder of the node that was asked for.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do
  case $1 in
  --nodelist=*) export RAY_TMPDIR=$RLSYS_TEST_FOLDER/${1#*=} ;;
  --overlap | --nodes=1 | --ntasks-per-node=1 | --cpus-per-task=2 | --cpu-bind=none) ;;
  *) echo "srun: unknown $1" >&2; exit 2 ;;
  esac
  shift
done
mkdir -p "$RAY_TMPDIR"
exec "$@"
"""


def slurm_command(job: Callable[..., JobConfig], tmp_path: Path) -> str:
    match = re.fullmatch(r"`sbatch (deploy/slurm.sh) configs/quickstart.yaml`", readme_start("Slurm"))
    assert match
    return shlex.join(["bash", match[1], write_job(job, tmp_path), f"run.dir={tmp_path}"])
