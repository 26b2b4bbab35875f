"""Expands paths that a user writes as a shell would, and quotes commands so that they can be pasted into a shell.

    ~  ~user  $NAME  ${NAME}      as in a shell, at the start of a path and anywhere in it
    \\$  \\\\                       the characters themselves

An unset or empty variable is an error, while a shell would insert nothing: ``$SCRATCH/runs`` would be ``/runs``.
"""

from __future__ import annotations

import os
import pwd
import re
import shlex
from pathlib import Path

from rlsys.errors import ConfigError
from rlsys.utils.env_variables import env_variable

_NAME = re.compile(r"\\(?P<escaped>[\\$])|\$(?P<bare>[A-Za-z_]\w*)|\$\{(?P<braced>[A-Za-z_]\w*)\}|\$[{(]", re.ASCII)


def expand(text: str) -> str:
    """
    Raises:
        ConfigError: the path is empty or holds NUL, or names a variable or a user that does not exist.
    """
    if not text or "\0" in text:
        raise ConfigError(f"found {text!r}; wanted a path")
    head, slash, rest = text.partition("/")
    if head.startswith("~"):
        return _home(head[1:]) + slash + _NAME.sub(_value, rest)
    return _NAME.sub(_value, text)


def as_written(path: str | Path) -> str:
    """The text that `expand` turns into this path."""
    text = str(path).replace("\\", "\\\\").replace("$", "\\$")
    return f"./{text}" if text.startswith("~") else text


def expanded(path: str | Path) -> Path:
    """A path argument of a command line: a shell does not expand ``--out=~/x``."""
    return Path(expand(str(path)))


def command(*words: str | Path) -> str:
    """A command line with its words quoted for a shell."""
    return shlex.join(map(str, words))


def _home(user: str) -> str:
    try:
        return pwd.getpwnam(user).pw_dir if user else env_variable("HOME") or pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise ConfigError(
            f"~{user}: {'this machine has no such user' if user else 'HOME is not set, and this user has no home'}; "
            "wanted the full path" + (f", or ./~{user} for a folder of that name" if user else "")
        ) from None


def _value(found: re.Match[str]) -> str:
    if found["escaped"]:
        return found["escaped"]
    name = found["bare"] or found["braced"]
    if not name:
        raise ConfigError(f"found {found.string!r}; wanted variables as $NAME or ${{NAME}}, or \\$ for the character $")
    value = env_variable(name)
    if value is None:
        raise ConfigError(
            f"found {found.string!r}, and the environment variable {name} is not set or empty; set it, or write \\$ "
            "for the character $"
        )
    return value
