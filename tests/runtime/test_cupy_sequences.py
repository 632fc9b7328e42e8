"""Slots and pages of the CuPy backend's own sequences; no GPU is asked."""

from __future__ import annotations

import pytest

from megalith.format.errors import RequestError
from megalith.runtime.cupy_sequences import SequencePlaces
from megalith.runtime.gpu_buffers import Limits


def test_places_are_lent_once_and_come_back() -> None:
    places = SequencePlaces(Limits(2, 200, 128, 5, 132, 228 << 10, True))
    first, second = places.open(), places.open()
    assert {first.slot, second.slot} == {0, 1}
    with pytest.raises(RequestError, match="2 sequences are open"):
        places.open()
    assert places.reserve(first, 129)
    assert not places.reserve(first, 192)
    assert places.reserve(second, 65)
    assert sorted(first.pages + second.pages) == [0, 1, 2, 3, 4]
    with pytest.raises(RequestError, match="5 pages of 64 positions, all are taken"):
        places.reserve(second, 129)
    with pytest.raises(RequestError, match="201 positions: this backend is made for 200"):
        places.reserve(first, 201)
    kept = list(second.pages)
    places.close(first)
    assert first.pages == []
    third = places.open()
    assert third.slot == first.slot
    assert places.reserve(third, 192)
    assert sorted(third.pages + kept) == [0, 1, 2, 3, 4]
