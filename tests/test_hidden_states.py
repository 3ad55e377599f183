"""Hidden states in a file come back as they were written."""

import pytest
import torch

from vlquant.hidden_states import HiddenStates, write_states


def test_states_come_back_in_any_order(tmp_path):
    states = [torch.randn(length, 4) for length in (3, 1, 5)]
    lengths = write_states(tmp_path / "states.f32", (each[None] for each in states))
    assert lengths == (3, 1, 5)
    found = HiddenStates(tmp_path / "states.f32", lengths, 4)
    assert all(torch.equal(found[index], states[index]) for index in (2, 0, 1))
    assert all(map(torch.equal, found, states))
    with pytest.raises(IndexError):
        found[3]


def test_what_was_not_written_whole_is_not_there(tmp_path):
    def broken():
        yield torch.zeros(1, 2, 4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_states(tmp_path / "states.f32", broken())
    assert not (tmp_path / "states.f32").exists()
