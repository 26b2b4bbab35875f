"""A key that the server does not know: the first call that needs one says so within seconds."""

from __future__ import annotations

import time

from tests.serve.programs.sdk import service, wait
from tests.serve.programs.seen import MODEL, check, end, refused

if __name__ == "__main__":
    start = time.monotonic()
    refused("a wrong key", ["401"], lambda: wait(service().create_lora_training_client(base_model=MODEL, rank=8)))
    check("within 20 s", time.monotonic() - start < 20, True)
    end()
