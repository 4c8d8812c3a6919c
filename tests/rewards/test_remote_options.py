"""What a client of a reward server does without one: options, and how clips are divided into requests."""

import pytest
import torch

from rewards import Clip, RewardError, check
from rewards.remote import RemoteReward, portions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "127.0.0.1:8000"}, "url: expected http://host:port"),
        ({"url": "ftp://host"}, "url: expected"),
        ({"url": "http://host:99999"}, "url: expected"),
        ({"url": "http://me:secret@host"}, "url: expected"),
        ({"url": 8000}, "url: expected"),
        ({"name": ""}, "name: expected the name of a reward"),
        ({"scope": "clips"}, "scope 'clips' is not one of clip, group, batch"),
        ({"timeout": 0}, "timeout is 0, expected a number above 0"),
        ({"timeout": "long"}, "timeout is 'long'"),
        ({"patience": -1}, "patience is -1"),
        ({"concurrency": 1.5}, "concurrency is 1.5, expected a whole number"),
        ({"token_env": "REWARDS_TEST_UNSET"}, "environment variable REWARDS_TEST_UNSET: expected a token"),
    ],
)
def test_wrong_options_are_named_without_a_server(options, message):
    with pytest.raises(RewardError, match=message) as error:
        RemoteReward.check(**{"url": "http://127.0.0.1:9", "name": "clip", **options})
    assert "\n" not in str(error.value)


def test_a_check_asks_no_server():
    check("remote", url="http://127.0.0.1:9", name="clip", timeout=10)
    with pytest.raises(RewardError, match="no option 'time_out' .did you mean 'timeout'"):
        check("remote", url="http://127.0.0.1:9", name="clip", time_out=10)


def test_portions_keep_units_whole_and_within_bounds():
    def of(groups):
        return [Clip(torch.zeros(1, 3, 1, 1), "", group=group) for group in groups]

    assert portions(of([0] * 5), [4] * 5, "clip", 10) == [[0, 1], [2, 3], [4]]
    assert portions(of([0] * 3), [4, 99, 4], "clip", 10) == [[0], [1], [2]]
    assert portions(of([5, 6, 5, 6, 7]), [4] * 5, "group", 12) == [[0, 2], [1, 3, 4]]
    assert portions(of([0] * 3), [4] * 3, "batch", 1) == [[0, 1, 2]]
    assert [len(part) for part in portions(of([0] * 150), [0] * 150, "clip", 1)] == [64, 64, 22]
