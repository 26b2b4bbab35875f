"""Types of keys with rules that Ray, wandb, a shell or a clock would enforce later, with a worse message."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PlainSerializer

from rlsys.errors import ConfigError
from rlsys.utils.shell_paths import as_written, expand

PathText = Annotated[str, AfterValidator(expand), PlainSerializer(as_written, return_type=str, when_used="json")]


def _plain_name(text: str) -> str:
    """A name that is one folder inside any other folder, and that a command does not take for an option."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}", text):
        raise ValueError(
            f"found {text!r}; wanted 1 to 128 letters, digits, '.', '_' and '-', the first a letter, a digit or '_', "
            "and no path"
        )
    return text


Name = Annotated[str, AfterValidator(_plain_name)]


Seconds = Annotated[float, Field(gt=0, le=1_000_000)]  # poll() waits 24 days at most
Processes = Annotated[int, Field(ge=1, le=4096)]  # or threads, of one machine
Core = Annotated[int, Field(ge=0, le=4095)]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]  # Ray's, of a placement group


def _resources(amounts: dict[str, float]) -> dict[str, float]:
    for name, amount in amounts.items():
        if name in ("CPU", "GPU", "memory", "object_store_memory"):
            raise ValueError(
                f"found {name}; wanted custom resources, as in `ray start --resources`; see num_cpus, num_gpus"
            )
        if not name or not RAY_UNIT <= amount <= 1_000_000:
            raise ValueError(f"found {{{name!r}: {amount:g}}}; wanted a name, and an amount of {RAY_UNIT} to 1000000")
    return amounts


RAY_UNIT = 1e-4  # the smallest amount of a resource that Ray counts
Cpus = Annotated[float, Field(ge=RAY_UNIT, le=4096)]
Resources = Annotated[dict[str, float], AfterValidator(_resources)]


def _gpus(amount: float) -> float:
    if 0 < amount < RAY_UNIT or (amount > 1 and amount != int(amount)):
        raise ValueError(
            f"found {amount:g}; wanted a fraction of one GPU, at least {RAY_UNIT}, or a whole number of GPUs"
        )
    return amount


Gpus = Annotated[float, Field(ge=0, le=4096), AfterValidator(_gpus)]


def checked_address(address: str | None) -> str | None:
    """An address of Ray: auto, local, or host:port, perhaps behind ray://.

    Raises:
        ConfigError: it has another shape.
    """
    if address is None or address in ("auto", "local"):
        return address
    port = address.rpartition(":")[2]
    if not re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:.%]+\]|[^\s:/]+):[0-9]{1,5}", address) or not 0 < int(port) < 2**16:
        raise ConfigError(f"found {address!r} as Ray's address; wanted host:port with a port of 1 to 65535, or auto")
    return address


Address = Annotated[str | None, AfterValidator(checked_address)]


def _wandb_project(name: str) -> str:
    if not 1 <= len(name) <= 128 or set(name) & set("/\\#?%:"):
        raise ValueError(f"found {name!r}; wanted 1 to 128 characters without / \\ # ? % : (wandb's rule)")
    return name


WandbProject = Annotated[str, AfterValidator(_wandb_project)]
WandbTag = Annotated[str, Field(min_length=1, max_length=64)]
