from __future__ import annotations

import gc

import pytest

from rlsys.utils.importing import without_collections


@pytest.mark.parametrize("enabled", [True, False])
def test_nothing_is_collected_inside_and_the_state_before_comes_back(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with without_collections():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
