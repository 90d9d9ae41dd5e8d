"""What every engine must do, tested on a real bmodel: the simulator's, the double's and the real sophon-sail's tests.

A subclass gives `open_it`: a fixture that takes "basic" or "io_alone" and gives an open engine.
"""

import gc
import threading
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.errors import UserError
from helpers.tensors import TensorInfo, from_bf16, to_bf16
from tests.engine_nets import ROWS, VOCABULARY, WIDTH, weights

STATES = (1, 1, WIDTH)
PAST = (1, ROWS, WIDTH)


def bf16(shape, seed=0):
    """Random bfloat16 bits, and the float32 values that they stand for."""
    bits = to_bf16(np.random.default_rng(seed).normal(size=shape).astype(np.float32))
    return bits, from_bf16(bits)


def attend(states, past):
    """What the net `cache` computes, in float32."""
    scores = states[0] @ past[0].T
    exponents = np.exp(scores - scores.max())
    return states + (exponents / exponents.sum() @ past[0])[None], states @ weights()["row"]


def run_cache(engine, states_bits, past_bits):
    """Run `cache` on the net's own memory; its outputs as bits."""
    inputs = [engine.input_tensor("cache", k) for k in range(2)]
    outputs = [engine.output_tensor("cache", k) for k in range(2)]
    for tensor, bits in zip(inputs, (states_bits, past_bits), strict=True):
        engine.write(tensor, bits)
    engine.run("cache", inputs, outputs)
    return [engine.read(tensor) for tensor in outputs]


class EngineContract:
    @pytest.fixture(params=["basic", "io_alone"])
    def mode(self, request):
        return request.param

    @pytest.fixture
    def engine(self, open_it, mode):
        with open_it(mode) as engine:
            yield engine

    def test_nets_are_described(self, engine, mode):
        assert set(engine.nets) == {"embedding", "cache", "logits", "greedy_head"}
        cache = engine.nets["cache"]
        assert (cache.addr_mode, cache.dynamic) == (mode, False)
        assert cache.inputs == (TensorInfo("states", STATES, "bfloat16"), TensorInfo("past", PAST, "bfloat16"))
        assert [(info.shape, info.dtype) for info in cache.outputs] == [(STATES, "bfloat16")] * 2
        embedding, logits = engine.nets["embedding"], engine.nets["logits"]
        assert (embedding.inputs[0].shape, embedding.inputs[0].dtype) == ((1, ROWS), "int32")
        assert (logits.outputs[0].shape, logits.outputs[0].dtype) == ((1, VOCABULARY), "float32")
        assert engine.devices == (0,)

    def test_embedding_gives_its_rows_bit_for_bit(self, engine):
        ids = np.array([[3, 1, 4, 1, 5, 9, 2, 63]], dtype=np.int32)
        source, target = engine.input_tensor("embedding", 0), engine.output_tensor("embedding", 0)
        engine.write(source, ids)
        engine.run("embedding", [source], [target])
        expected = to_bf16(weights()["embedding"])[ids]
        np.testing.assert_array_equal(engine.read(target), expected)

    def test_attention_agrees_with_numpy(self, engine):
        (states_bits, states), (past_bits, past) = bf16(STATES, 1), bf16(PAST, 2)
        outputs = run_cache(engine, states_bits, past_bits)
        for found, expected in zip(outputs, attend(states, past), strict=True):
            np.testing.assert_allclose(from_bf16(found), expected, atol=0.05 * np.abs(expected).max())

    def test_a_new_row_goes_straight_into_the_cache(self, engine):
        (states_bits, states), (past_bits, past) = bf16(STATES, 3), bf16(PAST, 4)
        inputs = [engine.input_tensor("cache", k) for k in range(2)]
        engine.write(inputs[0], states_bits)
        engine.write(inputs[1], past_bits)
        crossed = (engine.bytes_to_device, engine.bytes_to_host)
        row = engine.view(inputs[1], 5 * WIDTH, STATES)
        engine.run("cache", inputs, [engine.output_tensor("cache", 0), row])
        assert (engine.bytes_to_device, engine.bytes_to_host) == crossed
        after = engine.read(inputs[1])
        changed = np.flatnonzero((after != past_bits).any(axis=(0, 2)))
        assert changed.tolist() == [5]
        expected = attend(states, past)[1]
        np.testing.assert_allclose(from_bf16(after[0, 5]), expected[0, 0], atol=0.05 * np.abs(expected).max())
        # The next run reads what this one left there, without the host.
        engine.run("cache", inputs, [engine.output_tensor("cache", k) for k in range(2)])
        expected = attend(states, from_bf16(after))[0]
        found = from_bf16(engine.read(engine.output_tensor("cache", 0)))
        np.testing.assert_allclose(found, expected, atol=0.05 * np.abs(expected).max())

    def test_what_is_written_once_is_read_by_every_run(self, engine):
        ids = engine.input_tensor("embedding", 0)
        target = engine.output_tensor("embedding", 0)
        engine.write(ids, np.full((1, ROWS), 7, dtype=np.int32))
        for _ in range(2):
            engine.run("embedding", [ids], [target])
            assert (engine.read(ids) == 7).all()
        first = run_cache(engine, bf16(STATES, 5)[0], bf16(PAST, 6)[0])
        inputs, outputs = ([get("cache", k) for k in range(2)] for get in (engine.input_tensor, engine.output_tensor))
        engine.run("cache", inputs, outputs)
        for before, tensor in zip(first, outputs, strict=True):
            np.testing.assert_array_equal(engine.read(tensor), before)

    def test_inputs_and_outputs_may_be_any_memory(self, engine):
        """Not only the net's own: as the chip, the runtime copies on the device where addresses are fixed."""
        (states_bits, _), (past_bits, _) = bf16(STATES, 7), bf16(PAST, 8)
        expected = run_cache(engine, states_bits, past_bits)
        other = [engine.allocate(shape, "bfloat16") for shape in (STATES, PAST, STATES, STATES)]
        engine.write(other[0], states_bits)
        engine.write(other[1], past_bits)
        engine.write(engine.input_tensor("cache", 1), np.zeros(PAST, dtype=np.uint16))
        engine.run("cache", other[:2], other[2:])
        for tensor, bits in zip(other[2:], expected, strict=True):
            np.testing.assert_array_equal(engine.read(tensor), bits)

    def test_net_memory_is_the_same_piece_at_every_call(self, engine):
        bits, _ = bf16(PAST, 9)
        engine.write(engine.input_tensor("cache", 1), bits)
        np.testing.assert_array_equal(engine.read(engine.input_tensor("cache", 1)), bits)

    def test_dynamic_net_takes_smaller_inputs(self, engine):
        values = np.random.default_rng(10).normal(size=(1, VOCABULARY)).astype(np.float32)
        source, token = engine.input_tensor("greedy_head", 0), engine.output_tensor("greedy_head", 0)
        engine.write(source, values)
        engine.run("greedy_head", [source], [token])
        assert engine.read(token).tolist() == [[int(values.argmax())]]
        half = engine.view(source, 0, (1, VOCABULARY // 2))
        engine.run("greedy_head", [half], [token])
        assert engine.read(token).tolist() == [[int(values[0, : VOCABULARY // 2].argmax())]]

    def test_new_memory_is_zero_and_copies_stay_on_the_device(self, engine):
        source, target = (engine.allocate((2, 3, 4), "float32") for _ in range(2))
        assert not engine.read(source).any()
        values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
        engine.write(source, values)
        crossed = (engine.bytes_to_device, engine.bytes_to_host)
        engine.copy(source, target)
        assert (engine.bytes_to_device, engine.bytes_to_host) == crossed
        np.testing.assert_array_equal(engine.read(target), values)

    def test_counters_count_bytes(self, engine):
        before = (engine.bytes_to_device, engine.bytes_to_host)
        tensor = engine.allocate((5, 7), "bfloat16")
        assert (engine.bytes_to_device, engine.bytes_to_host) == before
        engine.write(tensor, np.zeros((5, 7), dtype=np.uint16))
        engine.read(engine.view(tensor, 7, (7,)))
        assert (engine.bytes_to_device - before[0], engine.bytes_to_host - before[1]) == (70, 14)

    def test_read_gives_an_array_of_its_own(self, engine):
        tensor = engine.allocate((4,), "int32")
        array = engine.read(tensor)
        array[:] = 9
        assert not engine.read(tensor).any()

    def test_views_behave_like_slices(self, open_it):
        with open_it("basic") as engine:
            base = engine.allocate((3, 50), "int32")
            expected = np.zeros(150, dtype=np.int32)

            @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
            @given(st.data())
            def slices(data):
                start = data.draw(st.integers(0, 149))
                length = data.draw(st.integers(1, 150 - start))
                inner = data.draw(st.integers(0, length - 1))
                value = data.draw(st.integers(-(2**31), 2**31 - 1))
                view = engine.view(base, start, (length,))
                engine.write(engine.view(view, inner, (1, 1)), np.array([[value]], dtype=np.int32))
                expected[start + inner] = value
                np.testing.assert_array_equal(engine.read(view), expected[start : start + length])
                np.testing.assert_array_equal(engine.read(base).reshape(-1), expected)

            slices()

    def test_a_view_keeps_its_memory(self, engine):
        view = engine.view(engine.allocate((2, 64), "int32"), 64, (64,))
        gc.collect()
        others = [engine.allocate((2, 64), "int32") for _ in range(8)]
        engine.write(view, np.full(64, 5, dtype=np.int32))
        assert not any(engine.read(other).any() for other in others)
        assert (engine.read(view) == 5).all()

    def test_numpy_integers_are_as_good_as_pythons(self, engine):
        base = engine.allocate(np.array([3, 4]), "int32", device=np.int64(0))
        view = engine.view(base, np.int64(4), np.array([2, 2]))
        assert view.shape == (2, 2)
        engine.write(view, np.ones((2, 2), dtype=np.int32))
        engine.copy(view, engine.view(base, np.uint8(0), (4,)))
        assert engine.read(base).tolist() == [[1] * 4, [1] * 4, [0] * 4]

    def test_values_of_another_shape_or_dtype_are_refused(self, engine):
        tensor = engine.input_tensor("cache", 1)
        before = engine.read(tensor)
        for wrong in (
            np.zeros((1, ROWS, WIDTH + 1), dtype=np.uint16),
            np.zeros((ROWS, WIDTH), dtype=np.uint16),
            np.zeros(PAST, dtype=np.float32),
            np.zeros(PAST, dtype=np.int16),
        ):
            with pytest.raises(UserError, match=r"takes uint16 \(bfloat16\)"):
                engine.write(tensor, wrong)
        np.testing.assert_array_equal(engine.read(tensor), before)

    def test_an_array_that_is_not_contiguous_is_written_as_it_reads(self, engine):
        tensor = engine.allocate((3, 4), "int32")
        values = np.arange(12, dtype=np.int32).reshape(4, 3).T
        engine.write(tensor, values)
        np.testing.assert_array_equal(engine.read(tensor), values)

    def test_tensors_that_do_not_fit_the_net_are_refused(self, engine):
        states, past = (engine.input_tensor("cache", k) for k in range(2))
        outputs = [engine.output_tensor("cache", k) for k in range(2)]
        for inputs, said in (
            ([states], r"2 inputs, 1 were given"),
            ([past, states], r"inputs\[0\] \(states\) is bfloat16 \[1, 1, 32\]"),
            ([states, engine.view(past, 0, (ROWS, WIDTH))], r"inputs\[1\] \(past\)"),
            ([states, engine.allocate(PAST, "float16")], r"float16"),
        ):
            with pytest.raises(UserError, match=said):
                engine.run("cache", inputs, outputs)
        with pytest.raises(UserError, match=r"at most \[1, 64\]"):
            engine.run(
                "greedy_head",
                [engine.allocate((1, VOCABULARY + 1), "float32")],
                [engine.output_tensor("greedy_head", 0)],
            )

    def test_mistakes_are_told(self, engine):
        tensor = engine.allocate((2, 8), "float32")
        for mistake, said in (
            (lambda: engine.input_tensor("block_0", 0), "no net 'block_0'; it has cache, embedding"),
            (lambda: engine.input_tensor("cache", 2), "cache inputs has 2 tensors, number 2"),
            (lambda: engine.output_tensor("cache", -1), "number -1"),
            (lambda: engine.run("nothing", [], []), "no net 'nothing'"),
            (lambda: engine.view(tensor, 9, (8,)), "does not lie within"),
            (lambda: engine.view(tensor, -1, (2,)), "does not lie within"),
            (lambda: engine.view(tensor, 0, (0,)), "does not lie within"),
            (lambda: engine.allocate((2,), "int64"), "no device dtype 'int64'"),
            (lambda: engine.allocate((), "int32"), "1 to 8 dimensions"),
            (lambda: engine.allocate((2,), "int32", device=1), "1 was asked for"),
            (lambda: engine.copy(tensor, engine.allocate((2, 8), "int32")), "same dtype"),
            (lambda: engine.copy(tensor, engine.view(tensor, 0, (8,))), "number of elements"),
        ):
            with pytest.raises(UserError, match=said):
                mistake()

    def test_a_closed_engine_says_so(self, open_it):
        engine = open_it("io_alone")
        tensor = engine.input_tensor("cache", 1)
        engine.close()
        engine.close()
        for late in (
            lambda: engine.read(tensor),
            lambda: engine.write(tensor, np.zeros(PAST, dtype=np.uint16)),
            lambda: engine.run("cache", [engine.input_tensor("cache", k) for k in range(2)], []),
        ):
            with pytest.raises(UserError):
                late()
        with pytest.raises(UserError, match="closed"):
            engine.read(tensor)

    def test_other_threads_go_on_during_a_run(self, engine):
        """Were Python's lock held during a run, another thread would get it before and after, never often within."""
        stop, ticks = threading.Event(), [0]

        def tick():
            while not stop.is_set():
                ticks[0] += 1
                time.sleep(0)  # some 60 µs on Linux: a fast machine's runs take a millisecond

        inputs, outputs = ([get("cache", k) for k in range(2)] for get in (engine.input_tensor, engine.output_tensor))
        within = []
        thread = threading.Thread(target=tick)
        thread.start()
        try:
            # On a busy machine a thread may get no turn in one run or in many, but not in all. With the lock held
            # there is one turn before a run and one after it (tried with ctypes.PyDLL's usleep: at most 1 in 200 runs).
            while len(within) < 1000 and max(within, default=0) <= 3:
                before = ticks[0]
                engine.run("cache", inputs, outputs)
                within.append(ticks[0] - before)
        finally:
            stop.set()
            thread.join()
        assert max(within) > 3

    def test_threads_take_turns(self, engine):
        tensors = [engine.allocate((64,), "int32") for _ in range(4)]
        failures = []

        def work(tensor, number):
            for k in range(20):
                values = np.full(64, number * 1000 + k, dtype=np.int32)
                engine.write(tensor, values)
                if not (engine.read(tensor) == values).all():
                    failures.append((number, k))

        threads = [threading.Thread(target=work, args=(tensor, k)) for k, tensor in enumerate(tensors)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert engine.bytes_to_host == engine.bytes_to_device == 4 * 20 * 256
