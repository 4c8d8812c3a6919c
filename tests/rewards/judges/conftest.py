"""A server that judges by brightness."""

import pytest

from tests.rewards.judges.judge_servers import ScriptedServer, brightness


@pytest.fixture
def bright_server():
    with ScriptedServer(brightness) as server:
        yield server
