from helpers.engines import open_engine
import pytest
from tests.engine_bmodel import build
from tests.engine_contract import EngineContract


@pytest.fixture(scope="session")
def bmodels():
    return build()


class TestSimulator(EngineContract):
    @pytest.fixture
    def open_it(self, bmodels):
        return lambda mode: open_engine(bmodels[mode], engine="simulator")
