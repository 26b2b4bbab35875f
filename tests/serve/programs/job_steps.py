"""The datums of a job's steps, as a script of a user would send them.

    python -m tests.serve.programs.job_steps STEPS.json

Keys: `seed` and `rank` of the adapter, and for each of the `steps` its `data` (`ids`, `target_tokens`, `logprobs`,
`advantages` of a datum) and the settings `adam` of its optimizer step.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tinker import types

from tests.serve.programs.sdk import datum, service, wait
from tests.serve.programs.seen import MODEL, end, say, step


def main(given: dict[str, Any]) -> None:
    trainer = wait(
        service().create_lora_training_client(
            base_model=MODEL, rank=given["rank"], seed=given["seed"], train_unembed=False
        )
    )
    for each in given["steps"]:
        data = [datum(one.pop("ids"), one.pop("target_tokens"), **one) for one in each["data"]]
        passed = trainer.forward_backward(data, given["loss"])
        moved = wait(trainer.optim_step(types.AdamParams(**each["adam"])))
        say(saw="a step", loss=wait(passed).metrics["loss:sum"], grad_norm=moved.metrics["grad_norm"])
    say(saw="the adapter", path=wait(trainer.save_weights_for_sampler("last")).path)


if __name__ == "__main__":
    with step("steps of a job"):
        main(json.loads(Path(sys.argv[1]).read_text()))
    end()
