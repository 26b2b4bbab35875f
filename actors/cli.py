"""The `rlsys` command line: one function per command; its docstring is the command's help."""

from __future__ import annotations

import functools
import gc
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from rlsys.errors import ConfigError, RlsysError, StorageError
from rlsys.utils.atomic_files import refusal
from rlsys.utils.env_variables import drop_empty_variables
from rlsys.utils.shell_paths import expand, expanded

if TYPE_CHECKING:
    from actors.forking.job_server import ForkServer
    from rlsys.config import ClusterSection, JobConfig
    from rlsys.evaluation.policy_source import PolicySource
    from rlsys.evaluation.record import EvalRecord
    from rlsys.planning.fit import Node
    from rlsys.utils.free_cores import Cores

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


def _load(config: Path, overrides: Sequence[str] | None) -> JobConfig:
    from rlsys.config import load_command  # takes most of the start's time, which `rlsys --help` does not need

    return load_command(config, overrides or ())


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


def _expanded_text(path: str | None) -> str | None:
    return None if path is None else expand(path)


@app.callback()
def rlsys() -> None:
    """Reinforcement learning for language models on your own Ray cluster."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the job.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the YAML: section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Delete the contents of the run directory and start over.")
    ] = False,
) -> None:
    """Train a policy, or resume an interrupted run.

    Joins the Ray cluster at cluster.address or RAY_ADDRESS; without an address, starts Ray on this machine."""
    job = _load(config, overrides)

    from actors.forking.job_server import job_server
    from rlsys.run_state.saved_config import with_threads_of
    from rlsys.utils.free_cores import sample_cores

    sample = functools.cache(sample_cores)  # before this command has processes that keep cores busy
    asked = job if fresh else with_threads_of(job.run_dir, job)
    with job_server(asked, sample) as server:  # it imports on another core while Ray is imported and started here
        from actors.forking.model_check import model_check

        _train(job, fresh, server, model_check(job, server), sample)


def _train(
    job: JobConfig,
    fresh: bool,
    server: ForkServer | None,
    check: Callable[[], tuple[str, ...]],
    sample: Callable[[], Cores],
) -> None:
    from actors.job import train as run_job  # Ray is imported only for a valid configuration
    from rlsys.tracking.progress import Progress, closing_rows

    progress = Progress()
    try:
        outcome = run_job(job, progress, fresh, server, check, sample)
    except KeyboardInterrupt:
        progress.note(
            f"Interrupted. The current step was discarded; run the command again to resume from {job.run_dir}"
        )
        raise typer.Exit(INTERRUPTED) from None
    rows = closing_rows(
        outcome.run_dir,
        accuracy_before=outcome.accuracy_before,
        accuracy_after=outcome.accuracy_after,
        steps=outcome.steps,
        seconds=outcome.seconds,
        wandb_dir=outcome.wandb_dir,
        wandb_url=outcome.wandb_url,
        adapter=outcome.run_dir / "adapter",
    )
    progress.summary("Interrupted; the completed steps are saved" if outcome.interrupted else "Done", rows)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="YAML file of the job.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the YAML: section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="Run directory, checkpoint folder or merged model; default: the base model.", callback=_expanded
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Completions per problem for pass@k; default: eval.samples.", min=0)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the JSON and the table; default: eval/ in the run directory.", callback=_expanded
        ),
    ] = None,
) -> None:
    """Evaluate a policy on the held-out problems: greedy accuracy and pass@k with confidence intervals.

    Writes only to the output folder, so it can be used while the run is active.
    """
    job = _load(config, [*(overrides or ()), *([] if samples is None else [f"eval.samples={samples}"])])

    from rlsys.evaluation.policy_source import find_policy

    policy = find_policy(job, checkpoint)

    from actors.forking.job_server import job_server

    with job_server(policy.config.with_threads(1, 1)) as server:  # unset counts are 1 in an evaluation
        from actors.forking.model_check import model_check

        record = _evaluate(job, policy, server, model_check(policy.config, server))

    from rlsys.evaluation.record import text, write

    data, table = write(record, out or job.run_dir / "eval")
    print(f"\n{text(record)}\n{data}\n{table}")


def _evaluate(
    job: JobConfig, policy: PolicySource, server: ForkServer | None, check: Callable[[], tuple[str, ...]]
) -> EvalRecord:
    from actors.evaluation import evaluate as run_evaluation  # Ray is imported only if the policy exists
    from rlsys.tracking.progress import Progress

    progress = Progress()
    try:
        return run_evaluation(job, policy, progress, server, check)
    except KeyboardInterrupt:
        progress.note("Interrupted. Nothing was written")
        raise typer.Exit(INTERRUPTED) from None


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file of the job.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the YAML: section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Address of a running Ray cluster.", envvar="RAY_ADDRESS")] = None,
    gpu_memory_gb: Annotated[
        float | None, typer.Option(help="Memory of each GPU of a described machine, in 10^9 bytes.", min=1)
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(help="GPUs of the described machine; default: 1 with --gpu-memory-gb.", min=1)
    ] = None,
    cpus: Annotated[
        int | None, typer.Option(help="CPU cores of the described machine; default: those of this machine.", min=1)
    ] = None,
    memory_gb: Annotated[
        float | None,
        typer.Option(
            help="Host memory of the described machine, in 10^9 bytes; default: free memory of this machine.", min=1
        ),
    ] = None,
) -> None:
    """Predict the memory and placement of a job, and check whether it fits. Starts nothing and needs no GPU.

    Compares with the machine described by --gpu-memory-gb, --gpus, --cpus and --memory-gb, else with the cluster at
    cluster.address or RAY_ADDRESS, else with this machine. Exit code 1: the job does not fit.
    """
    from rich.console import Console

    from actors.cluster.threads import threads_on
    from rlsys.architectures.model_shape import model_shape
    from rlsys.architectures.support import refuse_structure
    from rlsys.planning.plan import described_machine
    from rlsys.planning.plan import plan as make_plan
    from rlsys.planning.view import show

    job = _load(config, overrides)
    refuse_structure(job.model.path)
    notes: tuple[str, ...] = ()
    if _holds_more_than_a_config(job.model.path):
        from rlsys.planning.model_folder import check_job  # imports transformers, which other plans do not need

        notes = check_job(job)
    dims = model_shape(job.model)
    if any(part is not None for part in (gpu_memory_gb, gpus, cpus, memory_gb)):
        if gpus is not None and gpu_memory_gb is None:
            raise ConfigError(
                f"--gpus {gpus} was given without --gpu-memory-gb; give both, or neither for a machine without GPUs"
            )
        nodes = [described_machine(cpus or job.cluster.num_cpus, memory_gb, gpus or 1, gpu_memory_gb)]
        threads = threads_on(job, False, int(nodes[0].resources["CPU"]))
    else:
        nodes = _nodes_of(job.cluster, address)
        threads = threads_on(job, bool(job.cluster.address or address), None)
    comparison = make_plan(job, dims, nodes)
    show(job, dims, nodes, comparison, threads, Console(highlight=False))
    for note in notes:
        print(note)
    if comparison.shortfalls:
        raise typer.Exit(1)


def _nodes_of(section: ClusterSection, address: str | None) -> list[Node]:
    """The nodes of the cluster that the job would join, or this machine."""
    where = section.address or address
    if where:
        from actors.cluster.inventory import nodes_at

        return list(nodes_at(where))
    from actors.machine.gpus import this_machine

    return [this_machine(section.num_cpus)]


def _holds_more_than_a_config(model_path: str | None) -> bool:
    """Whether there are files to check beside config.json, which alone is enough for a plan."""
    if model_path is None or not Path(model_path).exists():
        return False
    return Path(model_path).is_file() or {path.name for path in Path(model_path).iterdir()} != {"config.json"}


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="Job whose model, cluster section and run.dir are checked too.", callback=_expanded),
    ] = None,
) -> None:
    """Check this machine: versions, devices, disk, ports, Ray, vLLM, logins; with CONFIG also the job's model.

    Exit code 1: a check failed."""
    from rich.console import Console

    from actors.doctor import examine
    from rlsys.config import ClusterSection, load_config
    from rlsys.planning.view import show_checks

    job = load_config(config) if config else None
    cluster, out = (job.cluster, Path(job.run.dir)) if job else (ClusterSection(), Path())
    checks = ((check.name, check.status, check.found, check.remedy) for check in examine(cluster, out, job))
    if show_checks(checks, Console(highlight=False)):
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint folder.", callback=_expanded)],
    out: Annotated[Path, typer.Argument(help="Folder to create.", callback=_expanded)],
    merged: Annotated[bool, typer.Option("--merged", help="Write the base with the adapter merged into it.")] = False,
    base: Annotated[
        str | None,
        typer.Option(
            help="With --merged: folder or hub name of the base; default: the base named in the checkpoint.",
            callback=_expanded_text,
        ),
    ] = None,
    for_vllm: Annotated[
        bool, typer.Option("--for-vllm", help="Use vLLM's layout where PEFT's differs (gate_up_proj of GLM-4).")
    ] = False,
) -> None:
    """Export a checkpoint for PEFT and vLLM: the adapter alone, or with --merged one merged model.

    Warns if PEFT's merge_and_unload() would give a different model than the trained one."""
    if base is not None and not merged:
        raise ConfigError("--base was given without --merged; an adapter alone needs no base")
    if for_vllm and merged:
        raise ConfigError("--for-vllm was given with --merged; a merged model has only one layout")

    from rlsys.learner.checkpoint_files import read_info
    from rlsys.learner.export import export_adapter, export_merged

    if merged:
        export_merged(base or read_info(checkpoint).base_name, checkpoint, out)
    else:
        for warning in export_adapter(checkpoint, out, for_vllm):
            print(warning, file=sys.stderr)


@app.command()
def serve(
    config: Annotated[
        str | None,
        typer.Argument(
            help="YAML file of the server; default: --model and defaults. With --status also the operator's address.",
            callback=_expanded_text,
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Overrides of the YAML: section.key=value.", metavar="[KEY=VALUE]...")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model folder or hub name to serve, under this name.", metavar="FOLDER_OR_NAME")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default: 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; default: 8000; 0: any free one.", min=0, max=65535)] = None,
    tls_certificate: Annotated[
        str | None, typer.Option(help="PEM file: the server's certificate, then its issuers.", metavar="FILE")
    ] = None,
    tls_key: Annotated[str | None, typer.Option(help="PEM file of the certificate's key.", metavar="FILE")] = None,
    status: Annotated[
        bool,
        typer.Option(
            "--status",
            help="Print the status of a running server as JSON: of its operator's address, of the server of a YAML, or "
            "of http://127.0.0.1:9000. A token is taken from operator.token_file of the YAML or from "
            "RLSYS_OPERATOR_TOKEN.",
        ),
    ] = False,
) -> None:
    """Serve unmodified programs of the Tinker API (its SDK, MinT's SDK, tinker-cookbook) and of OpenAI's.

    Joins the Ray cluster at deployment.cluster.address or RAY_ADDRESS; without an address, starts Ray on this machine.
    Prints the address and the two `export` lines for clients. The first start writes a key, readable by its owner only.
    Stops on Ctrl-C or SIGTERM, after running requests are done."""
    from rlsys.serve.load import load_serve_config

    given, file = list(overrides or ()), None if config is None else Path(config)
    if file is not None and config is not None and "=" in config and not file.exists():  # `rlsys serve --model X k=v`
        given, file = [config, *given], None
    base: dict[str, dict[str, object]] = {}
    if model is not None:
        base["models"] = {model: model}
    flags = {"host": host, "port": port, "tls_certificate": tls_certificate, "tls_key": tls_key}
    bind: dict[str, object] = {key: value for key, value in flags.items() if value is not None}
    if bind:
        base["bind"] = bind
    if status:
        import json

        from rlsys.serve.operator.client import status_of

        print(json.dumps(status_of(config if config and "://" in config else file, given, base), indent=1))
        return
    settings = load_serve_config(file, given, base)

    from actors.serve import serve as run_server  # Ray and torch are imported only for a valid configuration

    try:
        run_server(settings)
    except KeyboardInterrupt:
        print("Interrupted before the server was up", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@app.command("serve-key")
def serve_key(
    tenant: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, '_' and '-'.")],
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Read a key from the standard input, for its line alone.")
    ] = False,
) -> None:
    """Make a key for `rlsys serve`: its line for the keys file, with a hash in place of the key, on the standard
    output; the key itself, which is shown once, on the standard error.

    rlsys serve-key alice >> ~/.config/rlsys/serve-keys"""
    from rlsys.serve.keys import hashed_line, new_key

    key = sys.stdin.readline().strip() if stdin else new_key()
    line = hashed_line(key, tenant)
    if not stdin:
        print(f"key of {tenant}: {key}", file=sys.stderr)
    print(line)


RUN = typer.Argument(help="Run name or run directory.", callback=_expanded_text)
ADDRESS = typer.Option(
    help="Address of the Ray cluster; default: the address recorded in the run directory.", envvar="RAY_ADDRESS"
)


@app.command()
def scale(
    run: Annotated[str, RUN],
    samplers: Annotated[int, typer.Option(help="New number of samplers.")],
    address: Annotated[str | None, ADDRESS] = None,
) -> None:
    """Change the number of samplers of a running job. A removed sampler finishes its groups first."""
    if samplers < 1:
        raise ConfigError(f"--samplers {samplers}: wanted at least 1")

    from actors.reach import reach

    with reach(run, address) as name:
        from actors.control import ask

        print(ask(name or run, "scale", samplers))


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="Run directory; the run may be active.", callback=_expanded)],
) -> None:
    """Show how many of a run's sampled problems had each outcome, as of its last checkpoint."""
    from rlsys.data.problems import Epochs
    from rlsys.run_state.ledger import Ledger, describe
    from rlsys.run_state.resume import newest
    from rlsys.run_state.run_info import read_info
    from rlsys.run_state.saved_config import read_saved_config

    job = read_saved_config(run)
    latest = newest(run)
    if latest is None:
        raise ConfigError(f"{run}: has no checkpoint yet")
    epochs = Epochs(read_info(run)["train_problems"], job.rl.problems_per_step, job.run.seed)
    book = Ledger.from_bytes(latest.ledger, epochs)
    print(f"{run}: {len(book)} problems sampled up to step {book.step}")
    for state, reason, count in describe(book):
        print(f"{count:8}  {state}{f': {reason}' if reason else ''}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="Run directory.", callback=_expanded)],
    step: Annotated[int, typer.Option(help="Step to recompute; its rollouts must be kept (tracking.rollout_steps).")],
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Device to compute on; default: that of the run's learner.")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative tolerance; default: 1e-5.", min=0.0)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON file to write: all metrics, and p, q and advantage of each token.", callback=_expanded),
    ] = None,
) -> None:
    """Recompute a step of a run from its saved rollouts and a checkpoint, and compare every metric.

    Needs neither Ray nor vLLM, and does not change the run. Exit code 1: a metric differs by more than the tolerance.
    """
    from rich.console import Console

    from rlsys.replay.replay_step import TOLERANCE
    from rlsys.replay.replay_step import replay as compute
    from rlsys.replay.view import show, write

    replayed = compute(run, step, device)
    bound = TOLERANCE if tolerance is None else tolerance
    show(replayed, bound, Console())
    if out is not None:
        write(replayed, out)
    if replayed.differing(bound):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="Run directory; the run may be active, finished or crashed.", callback=_expanded)
    ],
) -> None:
    """Rewrite report.html from the files that the run has written so far. The page works without a network."""
    from rlsys.report.page import report_of

    print(report_of(run))


@app.command()
def stop(
    name: Annotated[
        str | None, typer.Argument(help="Run name or directory, or name or base of a detached deployment; default: "
                                        "all deployments.", callback=_expanded_text)
    ] = None,
    address: Annotated[str | None, ADDRESS] = None,
) -> None:  # fmt: skip
    """Stop a running job after its current step, or stop detached deployments of ServiceClient."""
    from actors.reach import reach

    with reach(name, address) as known:
        from actors.control import ask, running
        from actors.service.deployment import stop as end

        if known is not None and known in running():
            print(f"{known}: {ask(known, 'stop', None)}")
            return
        ended = end(known)
        jobs = running()
    if known and not ended:
        raise ConfigError(
            f"no running job or deployment is named {known!r}, and no deployment serves a base of that name; "
            f"running jobs: {', '.join(jobs) or 'none'}"
        )
    print(f"stopped: {', '.join(ended)}" if ended else _nothing_to_stop(jobs))


@app.command()
def warm(
    threads: Annotated[int, typer.Option(help="Threads of the learners and samplers to serve.", min=1)] = 1,
    idle_minutes: Annotated[
        float, typer.Option(help="End a node's processes after so long without a start; 0: never.", min=0)
    ] = 0.0,
    end: Annotated[bool, typer.Option("--stop", help="End the processes of all nodes instead.")] = False,
    address: Annotated[str | None, typer.Option(help="Address of the Ray cluster.", envvar="RAY_ADDRESS")] = None,
) -> None:
    """Keep torch and vLLM imported on each node of a Ray cluster, so that jobs on CPU start sooner.

    A job uses these processes if its code, Python and environment are the same, and says so if not. They end with the
    cluster."""
    from actors.cluster.ray_cluster import cluster
    from actors.forking import warm as servers
    from rlsys.config import ClusterSection
    from rlsys.config.key_types import checked_address

    with cluster(ClusterSection(address=checked_address(address) or "auto")):
        if end:
            count = servers.stop()
            print(f"stopped: {count} warm {'server' if count == 1 else 'servers'}")
            return
        for held in servers.start(threads, 60 * idle_minutes):
            since = "was warm already" if held.found else "is warm"
            print(
                f"{held.node} {since} for {held.threads} {'thread' if held.threads == 1 else 'threads'}: "
                f"{held.memory_bytes / 1e9:.2f} GB in processes {', '.join(map(str, held.processes))}"
            )


def _nothing_to_stop(jobs: Sequence[str]) -> str:
    """Without a name, `rlsys stop` ends deployments only."""
    running = f"; running jobs, which are stopped by name: {', '.join(jobs)}" if jobs else ""
    return f"no deployment was running{running}"


def main() -> None:
    """Entry point of the console script. Errors of rlsys and of the disk are printed as one message with exit code 1,
    without a traceback."""
    drop_empty_variables()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # LANG=C cannot encode all generated text
    try:
        app(standalone_mode=True)
    except RlsysError as error:  # first: StalledError is an OSError too, by way of TimeoutError
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        refused = refusal(error, Path.cwd())
        if refused is None:
            raise
        print(f"{StorageError.__name__}: {refused}", file=sys.stderr)
        sys.exit(1)
    finally:
        gc.freeze()  # at its exit the interpreter would search the objects of all imported modules for cycles
