"""What sophon.sail does and refuses, call by call: the same tests for the double and for the real one.

A subclass gives `sail`: a fixture with the module sophon.sail.
"""

from pathlib import Path

import numpy as np
import pytest

from tests.engine_contract import PAST, STATES, bf16
from tests.engine_nets import ROWS, WIDTH


class SailContract:
    @pytest.fixture
    def handle(self, sail):
        return sail.Handle(0)

    @pytest.fixture
    def io_alone(self, sail, bmodels):
        return sail.EngineLLM(str(bmodels["io_alone"]), [0])

    @pytest.fixture
    def basic(self, sail, bmodels):
        return sail.EngineLLM(str(bmodels["basic"]), [0])

    def test_what_it_tells_of_a_bmodel(self, sail, io_alone):
        assert sorted(io_alone.get_graph_names()) == ["cache", "embedding", "greedy_head", "logits"]
        assert (io_alone.get_addr_mode("cache"), io_alone.get_addr_mode("logits")) == (1, 0)
        assert (io_alone.get_is_dynamic("greedy_head"), io_alone.get_is_dynamic("cache")) == (True, False)
        assert (io_alone.get_input_num("cache"), io_alone.get_output_num("cache")) == (2, 2)
        assert io_alone.get_stage_num("cache") == 1
        assert io_alone.get_input_name("cache", 1) == "past"
        assert list(io_alone.get_input_shape("cache", 1)) == list(PAST)
        assert io_alone.get_input_dtype("cache", 1) == sail.Dtype.BM_BFLOAT16
        assert io_alone.get_input_dtype("embedding", 0).name == "BM_INT32"
        assert io_alone.get_output_dtype("logits", 0).name == "BM_FLOAT32"
        assert io_alone.get_input_tensor_devid("cache", 0) == io_alone.get_output_tensor_devid("cache", 1) == 0
        assert io_alone.get_device_ids() == [0]

    def test_a_net_that_is_not_there(self, io_alone):
        for call in (io_alone.get_addr_mode, io_alone.get_input_num, io_alone.get_input_tensors):
            with pytest.raises(IndexError):
                call("block_0")

    def test_engines_that_cannot_be_opened(self, sail, bmodels):
        file = bmodels["basic"]
        with pytest.raises(sail.SailEngineError, match="device_ids"):
            sail.EngineLLM(str(file), [])
        with pytest.raises(sail.SailEngineError, match="bmodel"):
            sail.EngineLLM(str(file) + "x", [0])
        for arguments in ((Path(file), [0]), (str(file), 0)):
            with pytest.raises(TypeError):
                sail.EngineLLM(*arguments)

    def test_own_tensors_are_for_io_alone_only(self, basic):
        assert basic.get_input_tensors("cache") == basic.get_output_tensors("cache") == {}
        assert sorted(basic.get_input_tensors_addrmode0("cache")) == [0, 1]
        assert sorted(basic.get_output_tensors_addrmode0("cache")) == [0, 1]

    def test_own_tensors_are_the_nets_memory(self, sail, io_alone):
        inputs, outputs = io_alone.get_input_tensors("cache"), io_alone.get_output_tensors("cache")
        assert (sorted(inputs), sorted(outputs)) == ([0, 1], [0, 1])
        bits, _ = bf16(PAST, 1)
        inputs[1].update_data(bits)
        inputs[0].update_data(bf16(STATES, 2)[0])
        np.testing.assert_array_equal(io_alone.get_input_tensors("cache")[1].asnumpy(), bits)
        row = sail.Tensor(inputs[1], [1, 1, WIDTH], 3 * WIDTH)
        assert io_alone.process("cache", inputs, {0: outputs[0], 1: row}) is None
        after = inputs[1].asnumpy()
        assert np.flatnonzero((after != bits).any(axis=(0, 2))).tolist() == [3]
        np.testing.assert_array_equal(row.asnumpy().reshape(-1), after[0, 3])

    def test_created_tensors_are_new_and_zero(self, io_alone):
        created = io_alone.create_max_input_tensors("cache")
        assert sorted(created) == [0, 1] and not created[1].asnumpy().any()
        created[1].update_data(bf16(PAST, 3)[0])
        own = io_alone.get_input_tensors("cache")[1]
        own.update_data(np.zeros(PAST, dtype=np.uint16))
        np.testing.assert_array_equal(created[1].asnumpy(), bf16(PAST, 3)[0])
        assert sorted(io_alone.create_max_output_tensors("cache")) == [0, 1]

    def test_tensors_in_device_memory(self, sail, io_alone, handle):
        tensor = sail.Tensor(handle, [2, 8], sail.Dtype.BM_FLOAT32, False, True)
        assert list(tensor.shape()) == [2, 8] and tensor.dtype() == sail.Dtype.BM_FLOAT32
        assert tensor.is_dev_data_valid() and not tensor.is_sys_data_valid()
        assert not tensor.asnumpy().any()
        tensor.update_data(np.arange(16, dtype=np.float32).reshape(2, 8))
        # Without memory of the host these do nothing.
        tensor.sync_s2d()
        tensor.sync_d2s()
        assert tensor.asnumpy().tolist() == np.arange(16).reshape(2, 8).tolist()

    def test_tensors_with_host_memory_cross_when_told(self, sail, io_alone, handle):
        tensor = sail.Tensor(handle, [4], sail.Dtype.BM_INT32, True, True)
        tensor.update_data(np.arange(4, dtype=np.int32))
        other = sail.Tensor(handle, [4], sail.Dtype.BM_INT32, False, True)
        other.sync_d2d(tensor, 0, 0, 4)
        assert not other.asnumpy().any()
        tensor.sync_s2d()
        other.sync_d2d(tensor, 0, 0, 4)
        assert other.asnumpy().tolist() == [0, 1, 2, 3]
        tensor.update_data(np.zeros(4, dtype=np.int32))
        tensor.sync_d2s()
        assert tensor.asnumpy().tolist() == [0, 1, 2, 3]

    def test_a_tensor_without_memory(self, sail, io_alone, handle):
        tensor = sail.Tensor(handle, [4], sail.Dtype.BM_INT32, False, False)
        for use in (tensor.asnumpy, lambda: tensor.update_data(np.zeros(4, dtype=np.int32))):
            with pytest.raises(sail.SailTensorError, match="invalid Tensor"):
                use()
        with pytest.raises(sail.SailTensorError, match="invalid Tensor"):
            sail.Tensor(tensor, [2], 0)
        for shape in ([], [2, 0], [-1]):
            assert not sail.Tensor(handle, shape, sail.Dtype.BM_INT32, False, True).is_dev_data_valid()

    def test_views(self, sail, io_alone, handle):
        tensor = sail.Tensor(handle, [2, 6], sail.Dtype.BM_INT32, False, True)
        tensor.update_data(np.arange(12, dtype=np.int32).reshape(2, 6))
        view = sail.Tensor(tensor, [2, 2], 5)
        assert view.asnumpy().tolist() == [[5, 6], [7, 8]]
        inner = sail.Tensor(view, [1], 3, True)
        inner.update_data(np.array([-1], dtype=np.int32))
        assert tensor.asnumpy().reshape(-1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1, 9, 10, 11]
        for shape, offset, said in (
            ([4], 9, "size out of range"),
            ([13], 0, "size out of range"),
            ([0], 0, "invalid shape"),
            ([], 0, "invalid shape"),
        ):
            with pytest.raises(sail.SailTensorError, match=said):
                sail.Tensor(tensor, shape, offset)
        with pytest.raises(sail.SailTensorError, match="not supported"):
            sail.Tensor(tensor, [1], 0, False)
        for offset in (-1, 1.0):
            with pytest.raises(TypeError):
                sail.Tensor(tensor, [1], offset)
        assert sail.Tensor(tensor, [2], np.int64(10)).asnumpy().tolist() == [10, 11]

    @pytest.mark.parametrize(
        "dtype, taken, refused",
        [
            ("BM_FLOAT32", ("float32", "float64", "int64"), ("int32", "uint16")),
            ("BM_INT32", ("int32",), ("uint32", "int64", "float32", "int16")),
            ("BM_BFLOAT16", ("uint16", "int16"), ("float16", "float32", "int32", "uint8")),
            ("BM_FLOAT16", ("uint16", "int16"), ("float16", "float32")),
        ],
    )
    def test_dtypes_of_arrays(self, sail, io_alone, handle, dtype, taken, refused):
        tensor = sail.Tensor(handle, [3], getattr(sail.Dtype, dtype), False, True)
        for name in taken:
            tensor.update_data(np.array([1, 2, 3], dtype=name))
            assert tensor.asnumpy().tolist() == [1, 2, 3], name
        for name in refused:
            with pytest.raises(sail.SailTensorError, match="Wrong dtype"):
                tensor.update_data(np.zeros(3, dtype=name))

    def test_shapes_of_arrays(self, sail, io_alone, handle):
        tensor = sail.Tensor(handle, [2, 3], sail.Dtype.BM_INT32, False, True)
        for shape in ((6,), (3, 2), (1, 3), (2, 3, 1)):
            with pytest.raises(sail.SailTensorError, match="invalid argument"):
                tensor.update_data(np.zeros(shape, dtype=np.int32))
        turned = np.arange(6, dtype=np.int32).reshape(3, 2).T
        tensor.update_data(turned)
        np.testing.assert_array_equal(tensor.asnumpy(), turned)

    def test_copies(self, sail, io_alone, handle):
        source = sail.Tensor(handle, [8], sail.Dtype.BM_INT32, False, True)
        target = sail.Tensor(handle, [2, 2], sail.Dtype.BM_INT32, False, True)
        source.update_data(np.arange(8, dtype=np.int32))
        target.sync_d2d(source, 5, 1, 3)
        assert target.asnumpy().tolist() == [[0, 5], [6, 7]]
        target.sync_d2d(source, *np.array([1, 0, 2]))
        assert target.asnumpy().tolist() == [[1, 2], [6, 7]]
        for arguments in ((source, 6, 0, 3), (source, 0, 2, 3)):
            with pytest.raises(sail.SailTensorError, match="size out of range"):
                target.sync_d2d(*arguments)
        other = sail.Tensor(handle, [8], sail.Dtype.BM_FLOAT32, False, True)
        with pytest.raises(sail.SailTensorError, match="mismatch"):
            target.sync_d2d(other, 0, 0, 4)

    def test_what_process_refuses(self, sail, io_alone):
        inputs, outputs = io_alone.get_input_tensors("cache"), io_alone.get_output_tensors("cache")
        with pytest.raises(IndexError):
            io_alone.process("block_0", inputs, outputs)
        with pytest.raises(TypeError):
            io_alone.process("cache", list(inputs.values()), outputs)
        larger = sail.Tensor(sail.Handle(0), [1, ROWS + 1, WIDTH], sail.Dtype.BM_BFLOAT16, False, True)
        for past in (sail.Tensor(inputs[1], [1, ROWS - 1, WIDTH], 0), larger, inputs[0]):
            with pytest.raises(sail.SailEngineError, match="Engine related error"):
                io_alone.process("cache", {0: inputs[0], 1: past}, outputs)
        # The engine refuses this one, sail does not.
        io_alone.process("cache", {0: inputs[0], 1: sail.Tensor(inputs[1], [ROWS, WIDTH], 0)}, outputs)
        io_alone.process("cache", inputs, outputs)
