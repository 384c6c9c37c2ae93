"""Both transports, for the modules whose tests are for both: `pytestmark = pytest.mark.usefixtures("each_transport")`."""

import pytest

from tests.transport import peers


@pytest.fixture(params=peers.TRANSPORTS)
def each_transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Let `make_pool` make the one, then the other."""
    name: str = request.param
    monkeypatch.setattr(peers, "chosen", peers.TRANSPORTS[name])
    return name
