"""Engines: where a bmodel runs. `open_engine` takes the chip where there is one, the simulator otherwise."""
