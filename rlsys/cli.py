"""rlsys on the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from rlsys.config import load_config
from rlsys.errors import ConfigError, RlsysError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C


@app.callback()
def rlsys() -> None:
    """Reinforcement learning for language models on your own Ray cluster."""


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="The job's YAML.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="section.key=value ...", metavar="[KEY=VALUE]...")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace an earlier run of the same name.")] = False,
) -> None:
    """Train a policy. Joins the cluster of RAY_ADDRESS or cluster.address, else starts Ray on this machine."""
    job = load_config(config, overrides or ())

    from actors.job import train as run_job  # Ray and torch are loaded once the configuration is known to be right
    from rlsys.progress import Progress, closing_rows

    progress = Progress()
    try:
        outcome = run_job(job, progress, replace)
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


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint's folder.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    merged: Annotated[bool, typer.Option("--merged", help="The base with the adapter added to its weights.")] = False,
    base: Annotated[
        str | None, typer.Option(help="Of --merged: folder or hub name; else the checkpoint's own.")
    ] = None,
) -> None:
    """Write a checkpoint for other programs: the adapter as PEFT and vLLM load it, or one merged model."""
    if base is not None and not merged:
        raise ConfigError("--base: found it without --merged; an adapter alone needs no base")

    from rlsys.checkpoints import read_info
    from rlsys.export import export_adapter, export_merged

    if merged:
        export_merged(base or read_info(checkpoint).base_name, checkpoint, out)
    else:
        export_adapter(checkpoint, out)


@app.command()
def stop(
    name: Annotated[
        str | None, typer.Argument(help="The name it was detached under, or its base; none: every one.")
    ] = None,
    address: Annotated[str, typer.Option(help="The Ray cluster.", envvar="RAY_ADDRESS")] = "auto",
) -> None:
    """End detached deployments that ServiceClient left running on a Ray cluster."""
    from actors.cluster import cluster
    from actors.deployment import stop as end
    from rlsys.config import ClusterSection

    with cluster(ClusterSection(address=address)):
        ended = end(name)
    if name and not ended:
        raise ConfigError(f"no running deployment is named {name!r}, and none has such a base")
    print(f"stopped: {', '.join(ended)}" if ended else "no deployment was running")


def main() -> None:
    """The console script: an error of rlsys is one readable message and exit code 1, not a traceback."""
    try:
        app(standalone_mode=True)
    except RlsysError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
