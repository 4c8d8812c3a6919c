"""Names to rewards: what load builds, and what load and check refuse in one line."""

import sys

import pytest
import torch

from rewards import KNOWN, Clip, RewardError, check, load

MINE = """
import dataclasses
import torch
from rewards import Scores

def bright(videos, prompts, gain=1.0, *, offset=0.0):
    return gain * videos.mean((1, 2, 3, 4)) + offset

def smooth(videos, prompts):
    return videos.mean((1, 2, 3, 4))
smooth.differentiable = True

def anything(videos, prompts, **options):
    return torch.full((len(prompts),), float(options["value"]))

class Judge:
    name, scope, differentiable = "judge", "group", False
    def __init__(self, strictness, rounds=3):
        self.strictness, self.rounds = strictness, rounds
    def __call__(self, clips):
        return Scores(torch.full((len(clips),), float(self.strictness * self.rounds)))

class Plain:
    def __init__(self, gain=1.0):
        self.gain = gain
    def __call__(self, videos, prompts):
        return self.gain * videos.mean((1, 2, 3, 4))

class NotCallable:
    pass

@dataclasses.dataclass
class Settings:  # needs its module to be registered
    size: int = 3
    def __call__(self, videos, prompts):
        return [float(self.size)] * len(prompts)

ready = Judge(2)
number = 3
"""


@pytest.fixture
def mine(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(MINE)
    return str(path)


def total(reward, prompts=("a", "b")):
    return reward([Clip(torch.full((2, 3, 4, 4), 0.5), prompt) for prompt in prompts]).total.tolist()


def test_a_known_name():
    reward = load("sprite_shape", sharpness=5.0)
    assert reward.name == "sprite_shape"


@pytest.mark.parametrize("name", [name for name in KNOWN if name.startswith("sprite_")])
def test_a_verifiable_reward_loads_without_options(name):
    check(name)
    assert load(name).name == name


def test_clip_loads_and_checks(clip_folder):
    check("clip", path=str(clip_folder), frames=4)
    assert len(load("clip", path=str(clip_folder), frames=4, device="cpu").indices(9, 16.0)) == 4


def test_a_function_is_lifted_with_its_options(mine):
    reward = load(f"{mine}:bright", gain=2.0, offset=0.25)
    assert (reward.name, reward.scope, reward.differentiable) == ("bright", "clip", False)
    assert total(reward) == [1.25, 1.25]
    assert load(f"{mine}:smooth").differentiable
    assert total(load(f"{mine}:anything", value=7)) == [7, 7]


def test_a_class_is_constructed_with_its_options(mine):
    reward = load(f"{mine}:Judge", strictness=2)
    assert (reward.name, reward.scope) == ("judge", "group")
    assert total(reward) == [6, 6]


def test_a_class_without_the_attributes_is_lifted(mine):
    reward = load(f"{mine}:Plain", gain=4.0)
    assert reward.name == "Plain"
    assert total(reward) == [2, 2]
    assert total(load(f"{mine}:Settings", size=5)) == [5, 5]


def test_an_object_is_taken_as_it_is(mine):
    assert total(load(f"{mine}:ready")) == [6, 6]


def test_a_module_of_a_package(tmp_path, monkeypatch):
    (tmp_path / "my_judges").mkdir()
    (tmp_path / "my_judges" / "__init__.py").touch()
    (tmp_path / "my_judges" / "first.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    assert total(load("my_judges.first:bright")) == [0.5, 0.5]
    for name in ("my_judges", "my_judges.first"):
        monkeypatch.delitem(sys.modules, name)


def test_two_files_of_one_name_stay_apart(tmp_path):
    rewards = []
    for value in (1, 2):
        (tmp_path / str(value)).mkdir()
        path = tmp_path / str(value) / "mine.py"
        path.write_text(f"def f(videos, prompts):\n    return [{value}.0] * len(prompts)\n")
        rewards.append(load(f"{path}:f"))
    assert [total(reward)[0] for reward in rewards] == [1, 2]
    first, second = (reward.function.func.__module__ for reward in rewards)
    assert first != second  # or pickle would find the one's code for the other
    assert {first, second} <= sys.modules.keys()


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "mine.py"
    for value in (1.0, 20.0):
        path.write_text(f"def f(videos, prompts):\n    return [{value}] * len(prompts)\n")
        assert total(load(f"{path}:f"))[0] == value


MISTAKES = [
    ("sprite_color", {}, "unknown name (did you mean 'sprite_colour'?)"),
    ("", {}, "unknown name"),
    (":f", {}, "expected package.module:callable"),
    ("rewards:", {}, "expected package.module:callable"),
    ("sprite_shape", {"sharpnes": 1}, "no option 'sharpnes' (did you mean 'sharpness'?)"),
    ("sprite_colour", {"sharpness": 1}, "no option 'sharpness'; it takes none"),
    ("no_such_package.judge:f", {}, "does not import: ModuleNotFoundError: No module named 'no_such_package'"),
    ("/nowhere/mine.py:f", {}, "no file /nowhere/mine.py"),
    ("{mine}:brigth", {}, "has no brigth (did you mean 'bright'?)"),
    ("{mine}:number", {}, "is of type int, expected a class or a function"),
    ("{mine}:bright", {"gian": 1}, "no option 'gian' (did you mean 'gain'?); options: gain, offset"),
    ("{mine}:bright", {"videos": 1}, "no option 'videos'"),
    ("{mine}:Judge", {}, "missing a required argument: 'strictness'"),
    ("{mine}:ready", {"gain": 1}, "takes no options, got gain"),
    ("{mine}:single", {}, "cannot be called with f(videos, prompts, **options)"),
    ("{broken}:f", {}, "does not import: ZeroDivisionError: division by zero"),
    ("{unfinished}:f", {}, "does not import: SyntaxError"),
    ("clip", {"path": "/nowhere"}, "no /nowhere/open_clip_config.json"),
    ("clip", {"pth": "x"}, "no option 'pth' (did you mean 'path'?)"),
    ("clip", {"path": "a/b", "batch_size": "many"}, "batch_size is 'many', expected a positive whole number"),
    ("clip", {"path": "a/b", "batch_size": 2.5}, "batch_size is 2.5, expected a positive whole number"),
    ("clip", {"path": "a/b", "device": "gpu"}, "cannot take path='a/b', device='gpu'"),
    ("vlm_rm", {"path": "a/b", "baseline": ["a", 1]}, "['a', 1] is not a text, or several"),
    ("clip", {"path": "x" * 300}, "File name too long"),
    ("video_reward", {"weights": 1}, "reward video_reward: weights 1: expected a list of numbers"),
    ("video_reward", {"path": "~nobody_here/x"}, "is not a folder here"),
    ("per_frame", {"image_reward": "clip", "weights": 3}, "cannot take image_reward='clip', weights=3"),
    ("vlm_score", {"url": "http://h/v1", "model": "m", "template": 3}, "template=3"),
]


@pytest.mark.parametrize("function", [load, check])
@pytest.mark.parametrize(("use", "options", "message"), MISTAKES)
def test_a_mistake_is_one_line(function, use, options, message, mine, tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "unfinished.py").write_text("def f(:\n")
    with open(mine, "a") as file:
        file.write("\ndef single(videos):\n    return videos\n")
    files = {"broken": tmp_path / "broken.py", "unfinished": tmp_path / "unfinished.py", "mine": mine}
    use = use.format(**files)
    with pytest.raises(RewardError) as caught:
        function(use, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_that_gives_no_callable(mine):
    with pytest.raises(RewardError, match="which cannot be called with clips"):
        load(f"{mine}:NotCallable")


def test_check_builds_nothing(tmp_path):
    path = tmp_path / "costly.py"
    path.write_text("class Costly:\n    def __init__(self, size):\n        raise MemoryError\n")
    check(f"{path}:Costly", size=3)
    with pytest.raises(MemoryError):
        load(f"{path}:Costly", size=3)


def test_check_asks_the_class(tmp_path):
    path = tmp_path / "picky.py"
    path.write_text(
        "from rewards import RewardError\n"
        "class Picky:\n"
        "    def __init__(self, size):\n        pass\n"
        "    @staticmethod\n"
        "    def check(size):\n        raise RewardError(f'size {size}')\n"
    )
    with pytest.raises(RewardError, match="size 3"):
        check(f"{path}:Picky", size=3)


def test_a_failed_import_leaves_no_module_behind(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(RewardError):
        load(f"{path}:f")
    assert set(sys.modules) == before


def part(use, **options):
    return {"use": use, "options": options}


def test_rewards_are_made_of_others_by_name(mine):
    parts = {"two": part(f"{mine}:bright", gain=2.0), "one": f"{mine}:smooth"}
    assert total(load("weighted", rewards=parts, weights={"two": 1, "one": 10})) == [6, 6]  # 2 / 2 + 10 / 2
    assert total(load("weighted", rewards=parts)) == [0.75, 0.75]
    assert load("weighted", rewards={"one": f"{mine}:smooth"}).differentiable
    assert load("per_frame", image_reward=f"{mine}:smooth", frames=2).name == "smooth"
    assert load("win_rate", judge=f"{mine}:smooth").scope == "group"
    inner = part("weighted", rewards=parts)
    found = total(load("aspects", reward=inner, groups={"a": {"two": 3, "one": 1}}))
    assert found == pytest.approx([0.875, 0.875])  # (3 * 1 + 0.5) / 4


def test_a_reward_may_be_given_as_a_part(mine):
    assert total(
        load("weighted", rewards={"one": load(f"{mine}:smooth"), "f": lambda videos, prompts: [1.5, 0.5]})
    ) == [1, 0.5]


@pytest.mark.parametrize(
    ("use", "options", "message"),
    [
        ("weighted", {"rewards": {"a": part("clipp")}}, r"reward clipp: unknown name \(did you mean 'clip'"),
        ("weighted", {"rewards": {"a": part("clip", pathh="x")}}, "reward clip: no option 'pathh'"),
        ("weighted", {"rewards": {"a": 3}}, "reward weighted: rewards.a is 3, expected a name, or {use"),
        ("weighted", {"rewards": {"a": {"use": "clip", "path": "x"}}}, "reward weighted: rewards.a is .*expected"),
        ("weighted", {"rewards": {"a": {"options": {}}}}, "reward weighted: rewards.a is .*expected"),
        ("weighted", {"rewards": {"a": {"use": "clip", "options": 3}}}, "reward weighted: rewards.a is .*expected"),
        ("weighted", {"rewards": ["sprite_colour"]}, "reward weighted: rewards is .*expected names and values"),
        ("weighted", {"rewards": {"a": "sprite_colour"}, "weights": [1]}, "weights is .1., expected names and values"),
        ("weighted", {"rewards": {"a": "sprite_colour"}, "weights": {"b": 1}}, "must name the same"),
        ("weighted", {"rewards": {"a": "sprite_colour"}, "weights": {"a": "big"}}, "must be finite numbers"),
        ("weighted", {}, "reward weighted: cannot be called with its options: missing .*'rewards'"),
        ("per_frame", {"image_reward": "sprite_colour", "select": "last"}, "reward .*: select is 'last'"),
        ("per_frame", {"image_reward": None}, "reward per_frame: image_reward is None, expected a name"),
        (
            "aspects",
            {"reward": "sprite_colour", "groups": {"a": {"x": -1}}},
            "a is {'x': -1}, expected one number above 0",
        ),
        ("aspects", {"reward": "sprite_colour", "groups": ["a"]}, "groups is .'a'., expected aspects and values"),
        ("win_rate", {"judge": part("nothing")}, "reward nothing: unknown name"),
    ],
)
def test_a_mistake_in_a_part_is_one_line(use, options, message):
    for refuses in (check, load):
        with pytest.raises(RewardError, match=message) as error:
            refuses(use, **options)
        assert "\n" not in str(error.value)


def test_check_asks_the_parts_and_builds_none(tmp_path):
    (tmp_path / "costly.py").write_text(
        "class Costly:\n"
        "    def __init__(self):\n"
        "        raise SystemError\n"
        "    @staticmethod\n"
        "    def check(**options):\n"
        "        (__import__('pathlib').Path(__file__).parent / 'asked').touch()\n"
    )
    check("win_rate", judge=part("weighted", rewards={"a": f"{tmp_path}/costly.py:Costly"}))
    assert (tmp_path / "asked").exists()
