"""References to columns on their way between actors."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from actors.cluster.column_refs import base_argument, pack_columns, unpack_columns
from rlsys.protocols import Ref
from rlsys.types import Array


def test_columns_of_several_lengths_are_the_same_after_packing_and_unpacking() -> None:
    lengths, values = pack_columns((Ref("a"), Ref("b")), (), (Ref("c"),))
    assert (lengths, values) == ((2, 0, 1), ["a", "b", "c"]), "Ray resolves what is an argument itself"
    assert unpack_columns(lengths, values) == [("a", "b"), (), ("c",)]


def test_lengths_that_do_not_fit_the_values_are_refused() -> None:
    with pytest.raises(AssertionError):
        unpack_columns((1, 1), ["a", "b", "c"])


def test_a_reference_can_be_made_with_its_type_and_travels() -> None:
    ref = Ref[Array](np.arange(3).tolist())
    assert pickle.loads(pickle.dumps(ref)) == ref == Ref([0, 1, 2])


def test_a_base_is_handed_to_ray_as_a_name_or_as_the_reference_inside() -> None:
    assert base_argument("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert base_argument(Ref("object")) == "object"
