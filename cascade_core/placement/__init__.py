"""Where weights are: resident on the device between runs, offloaded to main memory, or streamed block by block.

memory.py     the door: `DeviceMemory.run` onloads a network, runs a function on it, and retries in less memory
units.py      a network split into units that are copied as one
placement.py  one network's units, their patches, and the consumers that depend on them
plan.py       which units stay resident and which are streamed, by the free memory
stream.py     prefetches units into a few slots while the blocks before them compute
shared.py     workspaces of CUDA graphs that networks use in turn
loader.py     from the file, through pinned memory, to the device
pinned.py     pinned memory, and amounts of memory as they are written
plain.py      the same door for other than NVIDIA's cards, where networks are moved whole
device.py     what placement needs of a device; CUDA, and a simulation of it in main memory
"""

from .device import CudaDevice, Device, SimulatedDevice, out_of_memory
from .loader import Loader
from .memory import DeviceMemory
from .pinned import parse_bytes
from .placement import Placement, WeightConsumer
from .plain import PlainMemory
from .shared import RunBytes, largest_run
from .units import Unit

__all__ = [
    "CudaDevice",
    "Device",
    "DeviceMemory",
    "Loader",
    "Placement",
    "PlainMemory",
    "RunBytes",
    "SimulatedDevice",
    "Unit",
    "WeightConsumer",
    "largest_run",
    "out_of_memory",
    "parse_bytes",
]
