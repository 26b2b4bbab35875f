"""Terminal output of `rlsys plan` and `rlsys doctor`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlsys.architectures.model_shape import ModelShape
from rlsys.config import JobConfig
from rlsys.planning.fit import Node, amounts
from rlsys.planning.memory import MIB, gib
from rlsys.planning.plan import Plan, Row
from rlsys.planning.threads import Threads

STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}
SMALLEST_SHOWN = 0.01  # share of a role's total from which a part is listed


def show(
    config: JobConfig, dims: ModelShape, nodes: Sequence[Node], plan: Plan, threads: Threads, console: Console
) -> None:
    """Print the job, the nodes, the predicted memory, thread counts, warnings, shortfalls and the verdict."""
    line = console.print
    line(f"[bold]{escape(config.run.name)}[/]: {dims.parameters / 1e6:,.1f} M parameters, {config.model.dtype}")
    line(f"{escape(dims.family.name)}{escape(_shape(dims))}; dimensions from {escape(dims.source)}", soft_wrap=True)
    for node in nodes:
        gpu = "" if node.gpu_memory is None else f", GPUs of {gib(node.gpu_memory)}"
        line(f"{escape(node.name)} has {amounts(node.resources)}, {gib(node.memory)} of memory{gpu}", soft_wrap=True)
    line(_table(plan))
    for row in plan.rows:
        line(_parts(row), soft_wrap=True)
    line(f"threads: {escape(str(threads))}", soft_wrap=True)
    budget = config.learner.token_budget
    if plan.token_budget is None:
        line(
            f"token budget: learner.token_budget={budget} configured; no value can be suggested, because none fits or "
            "the GPU's memory is not known",
            soft_wrap=True,
        )
    else:
        line(
            f"token budget: {budget} configured; the largest useful value that fits is "
            f"learner.token_budget={plan.token_budget}",
            soft_wrap=True,
        )
    for warning in plan.warnings:
        line(f"[yellow]warning[/] {escape(warning)}", soft_wrap=True)
    for shortfall in plan.shortfalls:
        line(f"[red]shortfall[/] {escape(shortfall)}", soft_wrap=True)
    if not plan.shortfalls:
        line("[green]the job fits[/]")


def _shape(dims: ModelShape) -> str:
    """Properties of the model besides its size: mixture of experts, sliding windows."""
    mixture = f", {dims.num_experts} experts in {dims.mixture_layers} of {dims.num_layers} layers"
    window = f", a window of {dims.window} tokens in {dims.windowed_layers} of {dims.num_layers} layers"
    return (mixture if dims.mixture_layers else "") + (window if dims.window else "")


def _table(plan: Plan) -> Table:
    table = Table(title="predicted peak memory per actor", title_justify="left")
    for name in ("role", "count", "CPUs", "GPUs", "without imports", "with imports"):
        table.add_column(name, justify="left" if name == "role" else "right", no_wrap=True)
    for row in plan.rows:
        above = gib(row.memory.peak.total) + (" (GPU)" if row.on_gpu else "")
        table.add_row(row.role, str(row.count), f"{row.cpus:g}", f"{row.gpus:g}", above, gib(row.host_bytes))
    return table


def _parts(row: Row) -> str:
    """Largest parts of a role's peak: ``learner while updating: weights 207, activations 1,265 MiB``."""
    peak = row.memory.peak
    shown = ", ".join(
        f"{name} {size / MIB:,.0f}" for name, size in peak.parts.items() if size >= SMALLEST_SHOWN * peak.total
    )
    asleep = f"; while asleep {row.pinned / MIB:,.0f} MiB of pinned host memory" if row.pinned else ""
    place = f" of GPU memory, UNMEASURED on CUDA{asleep}" if row.on_gpu else ""
    return f"{row.role} while {peak.name}: {shown} MiB{place}"


def show_checks(checks: Iterable[tuple[str, str, str, str]], console: Console) -> int:
    """Print one line per (name, status, found, remedy) as soon as it arrives; returns the number of failed checks."""
    failed = 0
    for name, status, found, remedy in checks:
        failed += status == "fail"
        help_ = f" -> {escape(remedy)}" if remedy else ""
        console.print(f"[{STYLE[status]}]{status:<4}[/]  {name:<18} {escape(found)}{help_}", soft_wrap=True)
    return failed
