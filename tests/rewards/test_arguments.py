"""`[NAME=]use[:key=value,...]` on a command line."""

import pytest

from rewards import RewardError
from rewards.arguments import parse_reward, parse_rewards


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sprite_motion", ("sprite_motion", "sprite_motion", {})),
        ("motion=sprite_motion", ("motion", "sprite_motion", {})),
        ("clip:path=a/folder,frames=4", ("clip", "clip", {"path": "a/folder", "frames": 4})),
        ("my_reward.py:calm", ("calm", "my_reward.py:calm", {})),
        ("package.module:calm:limit=0.1", ("calm", "package.module:calm", {"limit": 0.1})),
        ("a.b-c=/deep/my_reward.py:calm:limit=1e-3", ("a.b-c", "/deep/my_reward.py:calm", {"limit": 0.001})),
        (
            "remote:url=http://127.0.0.1:8000,name=clip",
            ("remote", "remote", {"url": "http://127.0.0.1:8000", "name": "clip"}),
        ),
        ("clip:path=hf-hub:owner/name", ("clip", "clip", {"path": "hf-hub:owner/name"})),
        ("clip:path=a=b", ("clip", "clip", {"path": "a=b"})),
        ("x:w=[1,2],path=a,b,n=null", ("x", "x", {"w": [1, 2], "path": "a,b", "n": None})),
        (
            "m=weighted:rewards={a: x, b: {use: y, options: {n: 4}}},weights={a: 1, b: -2}",
            (
                "m",
                "weighted",
                {"rewards": {"a": "x", "b": {"use": "y", "options": {"n": 4}}}, "weights": {"a": 1, "b": -2}},
            ),
        ),
        ('x:a="4",b=true,c=,d={k: 1, l: 2}', ("x", "x", {"a": "4", "b": True, "c": None, "d": {"k": 1, "l": 2}})),
    ],
)
def test_an_argument_is_read(text, expected):
    assert tuple(parse_reward(text)) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected .NAME=.use"),
        ("a=", "expected .NAME=.use"),
        ("a=b=c", "expected .NAME=.use"),
        ("clip:frames=1,frames=2", "frames is given twice"),
        ("clip:frames=[1", "frames: .*is not a YAML value"),
        ("clip:name=a: b: c", "name: .*is not a YAML value"),
        ("clip:path=${oc.env:HOME", "path: .*is not a YAML value"),
    ],
)
def test_one_that_cannot_be_read_is_refused_in_one_line(text, message):
    with pytest.raises(RewardError, match=f"--reward .*{message}") as error:
        parse_reward(text)
    assert "\n" not in str(error.value)


def test_several_need_several_names():
    found = parse_rewards(["sprite_motion", "again=sprite_motion"])
    assert [argument.use for argument in found.values()] == ["sprite_motion"] * 2
    with pytest.raises(RewardError, match="the name sprite_motion is taken; give another: NAME=sprite_motion"):
        parse_rewards(["sprite_motion", "sprite_motion"])
