"""The program that starts a worker of Ray in its runtime environment, as Ray 2.60's own setup_worker.py does, without
importing Ray: the worker imports it again. Ray's node requires the file name.

    python setup_worker.py WORKER_PROGRAM [ARGUMENT]... --serialized-runtime-env-context=JSON --language=PYTHON

A runtime environment with more than plain variables and a Python command is left to Ray's program.
"""

import json
import os
import sys

CONTEXT = "--serialized-runtime-env-context="
LANGUAGE = "--language="


def main(arguments: list[str]) -> None:
    """Become the worker."""
    worker = [each for each in arguments if not each.startswith((CONTEXT, LANGUAGE))]
    given = [each.removeprefix(CONTEXT) for each in arguments if each.startswith(CONTEXT)]
    context = {name: value for name, value in json.loads(given[-1]).items() if value} if given else {}
    variables = context.pop("env_vars", {})
    python = context.pop("py_executable", sys.executable)
    expanded = any("$" in value for value in variables.values())
    if not given or context or expanded or LANGUAGE + "PYTHON" not in arguments:
        rays = os.path.join(os.path.dirname(worker[0]), "setup_worker.py")
        os.execv(sys.executable, [sys.executable, rays, *arguments])
    os.environ.update(variables)
    os.execvp("bash", ["bash", "-c", f'exec {python} "$@"', "bash", *worker])


if __name__ == "__main__":
    main(sys.argv[1:])
