"""The engine of a service, as far as it needs no engine."""

from __future__ import annotations

import json
from pathlib import Path

from rlsys.config import ModelSection, SamplerSection
from rlsys.service.snapshot_engine import SnapshotEngine


def test_requests_without_a_seed_draw_anew_in_every_session(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 8}))
    model = ModelSection(path=str(tmp_path), max_length=8)

    def session() -> list[int]:
        engine = SnapshotEngine(name="0", base=tmp_path, model=model, section=SamplerSection(), seed=0)
        return [engine.own_seed() for _ in range(20)]

    seeds = [seed for _ in range(3) for seed in session()]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)
