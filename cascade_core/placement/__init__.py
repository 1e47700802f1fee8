"""Where weights live: on the device between runs, one stage at a time, or streamed block by block as they are used.

memory.py  the door: `Pool.run` puts a network where it fits, runs something on it, and goes on in less memory
units.py   a network cut into pieces that move as one
placement.py  a network as its units, and what patches change of each
plan.py    which pieces stay and which are streamed, from the room that there is
stream.py  pieces on their way through a few slots while the ones before them compute
loader.py  from the file, through pinned memory, to the device
pinned.py  pinned memory
reserve.py memory that CUDA's allocator keeps for graphs
device.py  what all this asks of a device; CUDA's answer, and main memory's in its place
"""

from .device import Cuda, Device, MainMemory, out_of_memory
from .pinned import parse_bytes
from .memory import Pool, is_resident, placed_as, when_leaving
from .units import levels

__all__ = [
    "Cuda",
    "Device",
    "MainMemory",
    "Pool",
    "is_resident",
    "levels",
    "out_of_memory",
    "parse_bytes",
    "placed_as",
    "when_leaving",
]
