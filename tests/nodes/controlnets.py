"""ControlNets of all three backbones, small, with random weights, for the tiny cascade's Stage C."""

import json
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.networks.controlnet import ControlNet
from cascade_nodes.tests.nodes import tiny

WIDTH, BLOCKS = 32, 4  # of the tiny Stage C
EFFNET = {name: tiny.CONFIGS["compressor"][name] for name in ("stem", "stages", "c_last")}
CONFIGS: dict[str, dict[str, Any]] = {
    "canny": {"c_in": 1, "proj_blocks": [0, 3], **EFFNET},
    "inpaint": {"c_in": 4, "proj_blocks": [1, 3], **EFFNET},
    "super_resolution": {
        "c_in": 16, "proj_blocks": [2], "bottleneck_mode": "large", "c_wide": 32, "c_hidden": 16, "layers": 1,
        "c_last": 24,
    },
    "identity": {
        "c_in": 512, "proj_blocks": [0, 1, 2, 3], "bottleneck_mode": "simple", "c_wide": 8, "c_last": 16,
    },
}  # fmt: skip
SPREAD = 2.0  # of the residuals: enough to be seen in what Stage C predicts


def write_controlnet(models: Path, kind: str, **changed: Any) -> str:
    """A file of that kind under `models`; its name, which is the loader's value."""
    config = {"c_proj": WIDTH, **CONFIGS[kind], **changed}
    name = f"tiny_{kind}_{config['c_proj']}_{'_'.join(map(str, config['proj_blocks']))}.safetensors"
    torch.manual_seed(len(name))
    network = ControlNet.from_config(config).eval()
    tiny.shake(network)
    with torch.no_grad():
        for projection in network.projections:
            projection.get_parameter("2.weight").normal_()
        residuals = network(torch.rand(1, config["c_in"], 96, 128))
        for block, projection in zip(network.proj_blocks, network.projections, strict=True):
            projection.get_parameter("2.weight").mul_(SPREAD / residuals[block].std())
    metadata = {"kind": "controlnet", "config": json.dumps(config)}
    tiny.save(models / "controlnet" / name, network, metadata)
    return name


def hint(kind: str, batch: int = 1) -> torch.Tensor:
    """A random hint as such a ControlNet takes it, for a picture of 128 × 96 pixels at compression 32."""
    generator = torch.Generator().manual_seed(batch)
    channels = CONFIGS[kind]["c_in"]
    height, width = (96, 128) if channels < 16 else (3, 4)
    image_channels = max(channels, 3) if channels == 1 else channels  # grey comes as RGB
    return torch.rand(batch, height, width, image_channels, generator=generator)
