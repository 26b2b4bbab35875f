"""rlsys on the command line."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from rlsys.config import load_command, load_config
from rlsys.errors import ConfigError, RlsysError, StorageError
from rlsys.utils.atomic_files import refusal
from rlsys.utils.env_variables import drop_empty_variables
from rlsys.utils.shell_paths import expand, expanded

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


def _expanded(path: Path | None) -> Path | None:
    return None if path is None else expanded(path)


def _expanded_text(path: str | None) -> str | None:
    return None if path is None else expand(path)


@app.callback()
def rlsys() -> None:
    """Reinforcement learning for language models on your own Ray cluster."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The job's YAML.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over: remove what the run directory holds.")] = False,
) -> None:
    """Train a policy, or go on with a run that was interrupted.

    Joins the cluster of RAY_ADDRESS or cluster.address, else starts Ray on this machine."""
    job = load_command(config, overrides or ())

    from actors.job import train as run_job  # Ray and torch are loaded once the configuration is known to be right
    from rlsys.tracking.progress import Progress, closing_rows

    progress = Progress()
    try:
        outcome = run_job(job, progress, fresh)
    except KeyboardInterrupt:
        progress.note(
            f"Interrupted: stopped at once, a step in flight was dropped whole. What there was: {job.run_dir}"
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
    progress.summary("Interrupted; what there was is saved" if outcome.interrupted else "Done", rows)
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)


@app.command("eval")
def evaluate(
    config: Annotated[Path, typer.Argument(help="The job's YAML.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="A run's directory, a checkpoint of one, or a merged model; none: the base.", callback=_expanded
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Completions of each problem for pass@k; none: eval.samples.", min=0)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of JSON and table; none: the run's, in eval/.", callback=_expanded)
    ] = None,
) -> None:
    """Evaluate a policy on the job's held-out problems: greedy accuracy and pass@k, with confidence intervals.

    Trains nothing, and changes nothing of a run but its eval/, so that the run may be at work meanwhile.
    """
    job = load_command(config, [*(overrides or ()), *([] if samples is None else [f"eval.samples={samples}"])])

    from rlsys.evaluation.policy_source import find_policy

    candidate = find_policy(job, checkpoint)

    from actors.evaluation import evaluate as run_evaluation  # Ray is loaded once there is something to evaluate
    from rlsys.evaluation.record import text, write
    from rlsys.tracking.progress import Progress

    progress = Progress()
    try:
        record = run_evaluation(job, candidate, progress)
    except KeyboardInterrupt:
        progress.note("Interrupted: nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    data, table = write(record, out or job.run_dir / "eval")
    print(f"\n{text(record)}\n{data}\n{table}")


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="The job's YAML.", callback=_expanded)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
    address: Annotated[str | None, typer.Option(help="A running Ray cluster.", envvar="RAY_ADDRESS")] = None,
    gpu_memory_gb: Annotated[
        float | None, typer.Option(help="Of each GPU of a machine you have in mind, in 10^9 bytes as sold.", min=1)
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of that machine; none: 1 with --gpu-memory-gb.", min=1)] = None,
    cpus: Annotated[int | None, typer.Option(help="CPU cores of that machine; none: as here.", min=1)] = None,
    memory_gb: Annotated[
        float | None, typer.Option(help="Main memory of that machine in 10^9 bytes; none: what is free here.", min=1)
    ] = None,
) -> None:
    """Say what a job would need and whether it fits, without starting anything; no GPU needed.

    Compares with the cluster of cluster.address or RAY_ADDRESS, else with this machine, or with the machine that
    --gpu-memory-gb and its like describe. Exit code 1: it does not fit.
    """
    from rich.console import Console

    from rlsys.architectures.model_shape import model_shape
    from rlsys.architectures.support import refuse_structure
    from rlsys.planning.plan import plan as compare
    from rlsys.planning.view import show

    job = load_command(config, overrides or ())
    refuse_structure(job.model.path)
    notes: tuple[str, ...] = ()
    if _holds_more_than_a_config(job.model.path):
        from rlsys.planning.model_folder import check_job  # brings transformers, which other plans do without

        notes = check_job(job)
    dims = model_shape(job.model)
    where = job.cluster.address or address
    described = [gpu_memory_gb, gpus, cpus, memory_gb]
    if any(part is not None for part in described):
        from rlsys.planning.plan import described_machine

        if gpus is not None and gpu_memory_gb is None:
            raise ConfigError(f"--gpus {gpus}: found it without --gpu-memory-gb; wanted both, or neither for no GPU")
        nodes = [described_machine(cpus or job.cluster.num_cpus, memory_gb, gpus or 1, gpu_memory_gb)]
    elif where:
        from actors.cluster.inventory import nodes_at

        nodes = nodes_at(where)
    else:
        from actors.machine.gpus import this_machine

        nodes = [this_machine(job.cluster.num_cpus)]
    found = compare(job, dims, nodes)
    show(job, dims, nodes, found, Console(highlight=False))
    for note in notes:
        print(note)
    if found.shortfalls:
        raise typer.Exit(1)


def _holds_more_than_a_config(model_path: str | None) -> bool:
    """A config.json alone is enough for a plan."""
    if model_path is None or not Path(model_path).exists():
        return False
    return Path(model_path).is_file() or {path.name for path in Path(model_path).iterdir()} != {"config.json"}


@app.command()
def doctor(
    config: Annotated[
        Path | None,
        typer.Argument(help="A job whose model, cluster section and run.dir are looked at.", callback=_expanded),
    ] = None,
) -> None:
    """Check this machine: versions, devices, disk, ports, Ray, vLLM, logins; of a job, its model too.

    Exit code 1 if anything fails."""
    from rich.console import Console

    from actors.doctor import examine
    from rlsys.config import ClusterSection
    from rlsys.planning.view import show_checks

    job = load_config(config) if config else None
    cluster, out = (job.cluster, Path(job.run.dir)) if job else (ClusterSection(), Path())
    checks = ((check.name, check.status, check.found, check.remedy) for check in examine(cluster, out, job))
    if show_checks(checks, Console(highlight=False)):
        raise typer.Exit(1)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.", callback=_expanded)],
    out: Annotated[Path, typer.Argument(help="A new folder.", callback=_expanded)],
    merged: Annotated[bool, typer.Option("--merged", help="The base with the adapter added to its weights.")] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Of --merged: folder or hub name; else the checkpoint's own.", callback=_expanded_text),
    ] = None,
    for_vllm: Annotated[
        bool, typer.Option("--for-vllm", help="As vLLM loads it where PEFT's form is another: GLM-4's gate_up_proj.")
    ] = False,
) -> None:
    """Write a checkpoint for other programs: the adapter as PEFT and vLLM load it, or one merged model.

    Warns where PEFT would merge the adapter into another model than the one that was trained."""
    if base is not None and not merged:
        raise ConfigError("--base: found it without --merged; an adapter alone needs no base")
    if for_vllm and merged:
        raise ConfigError("--for-vllm: found it with --merged; a merged model has one form")

    from rlsys.learner.adapter_checkpoint import read_info
    from rlsys.learner.export import export_adapter, export_merged

    if merged:
        export_merged(base or read_info(checkpoint).base_name, checkpoint, out)
    else:
        for warning in export_adapter(checkpoint, out, for_vllm):
            print(warning, file=sys.stderr)


RUN = typer.Argument(help="A run's name, or its directory.", callback=_expanded_text)
ADDRESS = typer.Option(help="The Ray cluster; none: what the run's directory says.", envvar="RAY_ADDRESS")


@app.command()
def scale(
    run: Annotated[str, RUN],
    samplers: Annotated[int, typer.Option(help="How many there should be from now on.")],
    address: Annotated[str | None, ADDRESS] = None,
) -> None:
    """Add samplers to a running job, or have some leave after the groups that they hold."""
    if samplers < 1:
        raise ConfigError(f"--samplers {samplers}: wanted at least 1")

    from actors.control import ask, reach

    with reach(run, address) as name:
        print(ask(name or run, "scale", samplers))


@app.command()
def ledger(
    run: Annotated[Path, typer.Argument(help="A run's directory; it may be running.", callback=_expanded)],
) -> None:
    """What has become of every problem that a run has drawn, as its last checkpoint has it."""
    from rlsys.data.problems import Epochs
    from rlsys.run_state.ledger import Ledger, describe
    from rlsys.run_state.resume import newest
    from rlsys.run_state.run_info import read_info

    job = load_config(run / "config.yaml")
    latest = newest(run)
    if latest is None:
        raise ConfigError(f"{run}: has no checkpoint yet")
    epochs = Epochs(read_info(run)["train_problems"], job.rl.problems_per_step, job.run.seed)
    book = Ledger.from_bytes(latest.ledger, epochs)
    print(f"{run}: {len(book)} problems drawn up to step {book.step}")
    for state, reason, count in describe(book):
        print(f"{count:8}  {state}{f': {reason}' if reason else ''}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="A run's directory.", callback=_expanded)],
    step: Annotated[int, typer.Option(help="Of the steps whose rollouts are kept (tracking.rollout_steps).")],
    device: Annotated[Literal["cpu", "cuda"] | None, typer.Option(help="None: the learner's own.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Relative; none: 1e-5.", min=0.0)] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A JSON file: figures, and p, q and advantage of each token.", callback=_expanded),
    ] = None,
) -> None:
    """Compute a step of a run again, from the rollouts and the checkpoint that it kept, and compare every figure.

    Needs no Ray and no vLLM, and changes nothing in the run. Exit code 1: a figure differs by more than the tolerance.
    """
    from rich.console import Console

    from rlsys.replay.replay_step import TOLERANCE
    from rlsys.replay.replay_step import replay as compute
    from rlsys.replay.view import show, write

    found = compute(run, step, device)
    bound = TOLERANCE if tolerance is None else tolerance
    show(found, bound, Console())
    if out is not None:
        write(found, out)
    if found.differing(bound):
        raise typer.Exit(1)


@app.command()
def report(
    run: Annotated[
        Path, typer.Argument(help="A run's directory; it may be running, or have died.", callback=_expanded)
    ],
) -> None:
    """Write a run's report.html anew, from what it has written down so far: one page that needs no network."""
    from rlsys.report.page import report_of

    print(report_of(run))


@app.command()
def stop(
    name: Annotated[
        str | None, typer.Argument(help="A run's name or directory, or a detached deployment's name or base; none: "
                                        "every deployment.", callback=_expanded_text)
    ] = None,
    address: Annotated[str | None, ADDRESS] = None,
) -> None:  # fmt: skip
    """End a running job after the step in flight, or detached deployments that ServiceClient left running."""
    from actors.control import ask, reach, running
    from actors.service.deployment import stop as end

    with reach(name, address) as known:
        if known is not None and known in running():
            print(f"{known}: {ask(known, 'stop', None)}")
            return
        ended = end(known)
        jobs = running()
    if known and not ended:
        raise ConfigError(
            f"no running job or deployment is named {known!r}, and no deployment has such a base; "
            f"running jobs: {', '.join(jobs) or 'none'}"
        )
    print(f"stopped: {', '.join(ended)}" if ended else "no deployment was running")


def main() -> None:
    """The console script: an error of rlsys, or of a disk, is one readable message and exit code 1, not a traceback."""
    drop_empty_variables()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # LANG=C and its like cannot write what a model may say
    try:
        app(standalone_mode=True)
    except OSError as error:
        refused = refusal(error, Path.cwd())
        if refused is None:
            raise
        print(f"{StorageError.__name__}: {refused}", file=sys.stderr)
        sys.exit(1)
    except RlsysError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
