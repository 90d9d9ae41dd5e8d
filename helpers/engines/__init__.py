"""Engines: where a bmodel runs. `open_engine` takes the chip where there is one, the simulator otherwise."""

import os
from collections.abc import Sequence

from helpers.engines.base import DeviceTensor, Engine, NetInfo, TensorInfo
from helpers.errors import UserError

__all__ = ["ENGINES", "DeviceTensor", "Engine", "NetInfo", "TensorInfo", "open_engine"]

ENGINES = ("auto", "simulator", "chip")


def open_engine(bmodel: str | os.PathLike, engine: str = "auto", devid: Sequence[int] = (0,)) -> Engine:
    """Load a bmodel. The engine's `reason` says in one line what was taken and why.

    engine: "chip" (sophon-sail), "simulator" (tpu-mlir), or "auto": the chip where there is one.
    devid: the numbers of the devices, one for each that the bmodel was compiled for. The simulator has one, number 0.
    Raises UserError where the engine asked for is not there, or it cannot take the bmodel.
    """
    from helpers.engines.sail import SailEngine, count_devices, load_sail

    if engine not in ENGINES:
        raise UserError(f"There is no engine {engine!r}: take one of {', '.join(ENGINES)}.")
    devid = tuple(devid)
    no_chip = None
    if engine == "auto":
        try:
            count_devices(load_sail())
        except UserError as error:
            no_chip = error
    if engine == "chip" or (engine == "auto" and no_chip is None):
        opened: Engine = SailEngine(bmodel, devid)
        chosen = "asked for" if engine == "chip" else "sophon.sail finds a device"
        opened.reason = f"chip, device {','.join(map(str, devid))}: {chosen}"
        if opened.kind_of_time != "measured":
            opened.reason += ", built on the simulator's libraries"
        return opened

    from helpers.engines.simulator import SimulatorEngine

    if devid != (0,):
        why = f" (no chip was found: {no_chip})" if no_chip else ""
        raise UserError(f"The simulator has one device, number 0; --devid {','.join(map(str, devid))} needs chips{why}")
    try:
        opened = SimulatorEngine(bmodel)
    except UserError as error:
        if no_chip and "not installed" in str(error):
            raise UserError(f"Neither a chip nor the simulator is here. Chip: {no_chip} Simulator: {error}") from error
        raise
    opened.reason = f"simulator: {'asked for' if no_chip is None else no_chip}"
    return opened
