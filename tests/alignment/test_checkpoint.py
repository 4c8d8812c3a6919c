"""Checkpoints: whole or absent, the last few kept, damage told in one line."""

import pytest
import torch

from alignment.checkpoint import State, checkpoints, load_state, restore, save_state
from alignment.errors import UserError


def state(iteration: int, ema: bool = True) -> State:
    weights = {"transformer.a": torch.full((2, 3), float(iteration)), "transformer.b": torch.arange(4.0)}
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.tensor([1.0, 2.0, 3.0])
    optimizer.step()
    average = {name: t / 2 for name, t in weights.items()} if ema else {}
    return State(iteration, weights, optimizer.state_dict(), average, updates=7)


def test_a_state_comes_back(tmp_path):
    saved = state(3)
    loaded = load_state(save_state(tmp_path, saved, keep=2))
    assert (loaded.iteration, loaded.updates) == (3, 7)
    for name in saved.trained:
        assert torch.equal(loaded.trained[name], saved.trained[name])
        assert torch.equal(loaded.ema[name], saved.ema[name])
    moments = loaded.optimizer["state"][0]
    assert torch.equal(moments["exp_avg"], saved.optimizer["state"][0]["exp_avg"])
    assert float(moments["step"]) == 1
    assert load_state(save_state(tmp_path, state(4, ema=False), keep=2)).ema == {}


def test_the_last_few_are_kept_in_the_order_of_numbers(tmp_path):
    for iteration in (8, 9, 10, 999_999, 1_000_000):
        save_state(tmp_path, state(iteration), keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["999999", "1000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1000000", "999999"]


def test_an_interrupted_write_does_not_count(tmp_path, monkeypatch):
    save_state(tmp_path, state(1), keep=2)

    def full_disk(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path, state(2), keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["000001"]
    assert load_state(checkpoints(tmp_path)[-1]).iteration == 1
    monkeypatch.undo()
    save_state(tmp_path, state(2), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["000002"]


def test_writing_again_replaces(tmp_path):
    save_state(tmp_path, state(1), keep=2)
    save_state(tmp_path, state(1, ema=False), keep=2)
    assert load_state(tmp_path / "000001").ema == {}
    assert [path.name for path in tmp_path.iterdir()] == ["000001"]


@pytest.mark.parametrize("name", ["state.json", "trained.safetensors", "ema.safetensors", "optimizer.pt"])
def test_damage_is_told_in_one_line(tmp_path, name):
    path = save_state(tmp_path, state(1), keep=2)
    (path / name).write_bytes((path / name).read_bytes()[:-9])
    with pytest.raises(UserError) as caught:
        load_state(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: damaged checkpoint (")
    assert "delete it to resume from the one before" in message
    assert "\n" not in message


def test_nothing_is_unpickled(tmp_path):
    path = save_state(tmp_path, state(1), keep=2)
    torch.save({"state": tmp_path}, path / "optimizer.pt")  # a path is an object of a class, which only pickle restores
    with pytest.raises(UserError, match="damaged checkpoint"):
        load_state(path)


def test_weights_of_another_recipe_are_refused():
    parameters = {"a": torch.nn.Parameter(torch.zeros(2, 3))}
    with pytest.raises(UserError, match=r"x: holds 2 trained tensors, this recipe trains 1 others"):
        restore(parameters, {"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "x")
    with pytest.raises(UserError, match=r"x: a has shape \(3, 2\), expected \(2, 3\)"):
        restore(parameters, {"a": torch.zeros(3, 2)}, "x")
    restore(parameters, {"a": torch.ones(2, 3)}, "x")
    assert torch.equal(parameters["a"], torch.ones(2, 3))
