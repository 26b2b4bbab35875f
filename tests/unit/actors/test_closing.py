"""The end of a job: results first, then everything stops at the same time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from actors.job import _close
from rlsys.learner.checkpoint_files import CONFIG, MANIFEST, WEIGHTS
from rlsys.run_state.run_dir import RunStore
from rlsys.tracking.tracker import Tracker
from tests.unit.run_state.run_stores import config, ledger_at

ADAPTER = {CONFIG: b"{}", WEIGHTS: b"weights", MANIFEST: b"{}"}


def test_the_adapter_is_on_the_disk_before_an_engine_is_asked_to_stop_and_the_report_is_written(tmp_path: Path) -> None:
    job = config(tmp_path, "tracking.wandb=disabled")
    seen: list[dict[str, bytes]] = []
    with RunStore.open(job, note=lambda text: None) as store:
        store.save(1, ADAPTER, ledger_at(1, job))
        adapter = store.run_dir / "adapter"

        def ask_to_stop() -> None:
            seen.append({path.name: path.read_bytes() for path in adapter.iterdir()})

        values: Any = job.model_dump(mode="json")
        with Tracker(store.run_dir, job.tracking, job.run.name, values, note=lambda text: None) as tracker:
            _close(store, tracker, cast(Any, SimpleNamespace(ask_to_stop=ask_to_stop)))
            assert (store.run_dir / "report.html").is_file()
    assert seen == [ADAPTER]
