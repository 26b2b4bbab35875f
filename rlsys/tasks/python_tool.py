"""Task on any data set with a Python tool: the model writes a code block and reads its output.

    ```python
    print(34 * 87)
    ```
    ```output           a turn ends here, or at the end of the block
    2958                the reply
    ```

Each block runs in its own sandboxed process (rlsys/sandbox/run_python.py); no state is kept between blocks. The task
requires ``turns.python_tool: true``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from rlsys.sandbox.run_python import Sandbox
from rlsys.tasks.dataset import DataSet

_BLOCK = re.compile(r"```python\n(?P<code>(?:(?!```).)*?)\n?```\s*(?P<output>```output\s*)?\Z", re.DOTALL)


class PythonTool(DataSet):
    stop = ("```output",)  # ends a turn, in addition to the model's end tokens
    sandbox: ClassVar[Sandbox] = Sandbox()  # a task with a sandbox requires turns.python_tool

    @classmethod
    def reply(cls, turns: Sequence[str], answer: str) -> str | None:
        """Return the output of the code block at the end of the last turn; without a block, None: the end."""
        block = _BLOCK.search(turns[-1])
        if block is None:
            return None
        output = cls.sandbox.run(block["code"]).strip("\n")
        return f"\n{output}\n```\n" if block["output"] else f"```output\n{output}\n```\n"
