"""Every call of Tinker's SDK against one server, with any SDK from 0.6 to 0.38.

    TINKER_BASE_URL=... TINKER_API_KEY=... RLSYS_SERVE_MODEL=... python -m tests.serve.programs.walk [PART ...]

Parts: training, updates, custom, chunks, saving, sampling, refusals, listings. Numbers are compared with formulas in
NumPy.
"""

from __future__ import annotations

import sys
from typing import Any

from tests.serve.programs import listings, sampling, saving, training
from tests.serve.programs.sdk import VERSION, service, wait
from tests.serve.programs.seen import MODEL, check, end, say, step

PARTS = {
    "training": training.losses,
    "updates": training.updates,
    "custom": training.custom,
    "chunks": training.chunks,
    "saving": saving.states,
    "sampling": sampling.samples,
    "refusals": saving.refusals,
    "listings": listings.lists,
}


def main(parts: list[str]) -> None:
    say(saw="sdk", version=VERSION)
    with step("server capabilities"):
        answer = wait(client.get_server_capabilities())
        check(
            "the model is among those supported", MODEL in [each.model_name for each in answer.supported_models], True
        )
    trainer: Any = None
    with step("create a LoRA training client"):
        trainer = wait(
            client.create_lora_training_client(base_model=MODEL, rank=8, seed=1, user_metadata={"walk": "1"})
        )
    if trainer is None:
        return
    with step("get_info and the tokenizer"):
        info = wait(trainer.get_info())
        say(saw="info", model_id=info.model_id, name=info.model_data.model_name)
        check("get_info names the model as it was asked for", info.model_data.model_name, MODEL)
        check(
            "the rank is that of the request",
            info.model_data.lora_rank if hasattr(info.model_data, "lora_rank") else info.lora_rank,
            8,
        )
        check("the model is a LoRA", info.is_lora, True)
        tokenizer = trainer.get_tokenizer()
        check(
            "the tokenizer reads back what it wrote",
            tokenizer.decode(tokenizer.encode("What is 4 + 5?")),
            "What is 4 + 5?",
        )
    for part in parts or PARTS:
        with step(f"part {part}"):
            PARTS[part](client, trainer)
    with step("end of the session"):
        if hasattr(client, "close"):  # 0.28 on
            wait(client.close("success"))


if __name__ == "__main__":
    client: Any = None
    with step("service client"):
        client = service(user_metadata={"program": "walk"})
    if client is not None:
        main(sys.argv[1:])
    end()
