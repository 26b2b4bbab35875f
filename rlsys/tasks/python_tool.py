"""Any data set, and a model that may run Python: it writes a block, and reads what the block wrote.

    ```python
    print(34 * 87)
    ```
    ```output           a turn ends here, or with the block
    2958                the reply
    ```

Each block runs by itself, confined (rlsys/sandbox/run_python.py); nothing is left of one when the next runs. Only where
``turns.python_tool`` says so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from rlsys.sandbox.run_python import Sandbox
from rlsys.tasks.dataset import DataSet

_BLOCK = re.compile(r"```python\n(?P<code>(?:(?!```).)*?)\n?```\s*(?P<output>```output\s*)?\Z", re.DOTALL)


class PythonTool(DataSet):
    stop = ("```output",)  # ends a turn, beside the model's own end
    sandbox: ClassVar[Sandbox] = Sandbox()  # that there is one is what needs turns.python_tool

    @classmethod
    def reply(cls, turns: Sequence[str], answer: str) -> str | None:
        """What the block at the end of the last turn writes; a turn without one is the model's last."""
        block = _BLOCK.search(turns[-1])
        if block is None:
            return None
        written = cls.sandbox.run(block["code"]).strip("\n")
        return f"\n{written}\n```\n" if block["output"] else f"```output\n{written}\n```\n"
