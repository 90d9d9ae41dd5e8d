"""What is checked in a bmodel file before an engine is given it, and the memory that it will take."""

import os
from pathlib import Path

from helpers.bmodel.bmodel import CHIP, Bmodel, read_bmodel
from helpers.errors import UserError
from helpers.tensors import ADDR_MODES, HOST_DTYPE


def checked_bmodel(path: str | os.PathLike, devices: int) -> Bmodel:
    """The file's description, if an engine of so many devices can run it.

    Sophgo's runtime aborts, or says only that it failed, where this raises UserError: a damaged file, another chip,
    another number of devices, an address mode or dtype that the engines do not have.
    """
    bmodel = read_bmodel(Path(path))
    if bmodel.chip.upper() != CHIP:
        raise UserError(f"{path} is for the chip {bmodel.chip}, {CHIP} is needed: compile it for {CHIP}.")
    if bmodel.device_num != devices:
        ids = ",".join(map(str, range(bmodel.device_num)))
        raise UserError(
            f"{path} was compiled for {bmodel.device_num} device(s) and was given {devices}: name as many chips "
            f"(--devid {ids}), or compile it with --num_device {devices}."
        )
    for net in bmodel.nets.values():
        if net.info.addr_mode not in ADDR_MODES:
            raise UserError(f"{path}: {net.info.name} has address mode {net.info.addr_mode}; compile it with io_alone.")
        for tensor in (*net.info.inputs, *net.info.outputs):
            if tensor.dtype not in HOST_DTYPE:
                raise UserError(
                    f"{path}: {tensor.name} of {net.info.name} is {tensor.dtype}, an engine takes "
                    f"{', '.join(HOST_DTYPE)}: compile it with --quantize BF16, W8BF16 or W4BF16."
                )
    return bmodel


def device_bytes(bmodel: Bmodel) -> int:
    """Device memory that the bmodel takes: the runtime's, and the tensors of nets that have none of their own."""
    nets = bmodel.nets.values()
    runtime = sum(net.instruction_bytes + net.scratch_bytes + net.io_bytes for net in nets)
    tensors = sum(
        tensor.bytes
        for net in nets
        if net.info.addr_mode == "basic"
        for tensor in (*net.info.inputs, *net.info.outputs)
    )
    return bmodel.kernel_bytes + bmodel.weight_bytes + runtime + tensors
