"""The engine contract on sophon-sail, the real one. Opt-in: QWEN_SAIL=1 where `sophon.sail` and a device are there."""

import os

import pytest

from helpers.run.engines import open_engine
from helpers.run.generation import QwenRunner
from helpers.run.sail_package import sophon_sail
from tests.engine_bmodel import build
from tests.engine_contract import EngineContract
from tests.sail_contract import SailContract

if os.environ.get("QWEN_SAIL") != "1":
    pytest.skip("needs sophon-sail and a device: set QWEN_SAIL=1", allow_module_level=True)
pytestmark = pytest.mark.hardware


@pytest.fixture(scope="session")
def bmodels():
    return build()


def test_this_is_the_real_sail():
    state, where = sophon_sail()
    assert state == "real" and where.endswith(".so")


class TestSail(EngineContract):
    @pytest.fixture
    def open_it(self, bmodels):
        return lambda mode: open_engine(bmodels[mode], engine="chip")


class TestSailCalls(SailContract):
    @pytest.fixture
    def sail(self):
        import sophon.sail

        return sophon.sail


@pytest.mark.parametrize("addr_mode", ["io_alone", "basic"])
def test_the_chat_gives_the_simulators_tokens(compile_tiny, chat_prompt, stop_ids, demo_questions, addr_mode):
    bmodel = compile_tiny(addr_mode=addr_mode)
    answers = {}
    for kind in ("simulator", "chip"):
        with open_engine(bmodel, engine=kind) as engine:
            runner = QwenRunner(engine)
            # One in English, one in Chinese.
            answers[kind] = [
                list(runner.generate(chat_prompt(question), stop_ids=stop_ids, max_new_tokens=16))
                for question in (demo_questions[0], demo_questions[4])
            ]
            assert engine.name == kind
    assert answers["chip"] == answers["simulator"]
    assert all(len(tokens) > 3 for tokens in answers["chip"])
