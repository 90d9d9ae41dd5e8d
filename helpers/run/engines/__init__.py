"""Engines: where a bmodel runs. `open_engine` takes the chip where there is one, the simulator otherwise."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from helpers.errors import UserError
from helpers.run.engines.base import Engine
from helpers.run.engines.sail import SailEngine, count_devices, load_sail
from helpers.run.engines.simulator import SimulatorEngine, simulators_at_once

ENGINES = ("auto", "simulator", "chip")


def open_engine(bmodel: str | os.PathLike, engine: str = "auto", devid: Sequence[int] = (0,)) -> Engine:
    """Load a bmodel. The engine's `reason` says in one line what was taken and why.

    engine: "chip" (sophon-sail), "simulator" (tpu-mlir), or "auto": the chip where there is one.
    devid: the numbers of the devices, one for each that the bmodel was compiled for. The simulator has one, number 0.
    Raises UserError where the engine asked for is not there, or it cannot take the bmodel.
    """
    devid = tuple(devid)
    takes_chip, no_chip = _choose(engine)
    if takes_chip:
        opened: Engine = SailEngine(bmodel, devid)
        chosen = "asked for" if engine == "chip" else "sophon.sail finds a device"
        opened.reason = f"chip, device {','.join(map(str, devid))}: {chosen}"
        if opened.kind_of_time != "measured":
            opened.reason += ", built on the simulator's libraries"
        return opened

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
    if opened.no_yield:
        opened.reason += f" (many times slower than it could be: its threads do not yield. {opened.no_yield})"
    return opened


def on_each_bmodel(
    bmodels: Mapping[object, str | os.PathLike],
    work: Callable[[object, Engine], object],
    engine: str = "auto",
    devid: Sequence[int] = (0,),
) -> dict[object, object]:
    """What `work` returns for each bmodel, which it is given open and which is closed after it.

    On a chip one follows the other; of simulators, which are processes, as many run side by side as free memory holds.
    Raises what open_engine or `work` raises.
    """
    opened: list[Engine] = []

    def work_on(key: object) -> object:
        with open_engine(bmodels[key], engine, devid) as device:
            opened.append(device)
            return work(key, device)

    at_once = 1 if _choose(engine)[0] else simulators_at_once(list(bmodels.values()))
    with ThreadPoolExecutor(at_once) as pool:
        futures = {key: pool.submit(work_on, key) for key in bmodels}
        try:
            for future in as_completed(futures.values()):
                future.result()
        except BaseException:
            # The others would go on to their end before the caller heard of it.
            pool.shutdown(wait=False, cancel_futures=True)
            for device in opened:
                device.close()
            raise
    return {key: future.result() for key, future in futures.items()}


def _choose(engine: str) -> tuple[bool, UserError | None]:
    """Whether the chip is taken, and why there is none if it was looked for; raises UserError for an unknown name."""
    if engine not in ENGINES:
        raise UserError(f"There is no engine {engine!r}: take one of {', '.join(ENGINES)}.")
    if engine != "auto":
        return engine == "chip", None
    try:
        count_devices(load_sail())
    except UserError as error:
        return False, error
    return True, None
