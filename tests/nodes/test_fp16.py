"""Load Stage C in fp16, and on cards that have no bf16, without ComfyUI."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cascade_nodes.cascade_core import StageB, StageC
from cascade_nodes.cascade_core.checkpoints import write_safetensors
from cascade_nodes.cascade_core.networks.fp16 import STREAM_SCALE, stream_scale
from cascade_nodes.cascade_core.stages.device import ComputeDevice
from cascade_nodes.nodes.hosts.headless.model import load_network
from cascade_nodes.tests.core.overflowing import STAGE_B, STAGE_C, overflowing
from cascade_nodes.tests.golden_weights import relative_error


def write(folder: Path, kind: str, network: StageC | StageB, config: dict) -> Path:
    path = folder / f"{kind}.safetensors"
    overflowing(network)
    write_safetensors(path, network.state_dict(), {"kind": kind, "config": json.dumps(config)})
    return path


@torch.inference_mode()
def test_stage_c_in_fp16(tmp_path):
    network = StageC.from_config(STAGE_C)
    path = write(tmp_path, "stage_c", network, STAGE_C)
    model = load_network("stage_c", path, "fp16")
    x, r = torch.randn(1, 16, 7, 10), torch.tensor([0.5])
    prompt: dict[str, Any] = {
        "clip_text": torch.randn(1, 9, 32),
        "clip_text_pooled": torch.randn(1, 1, 32),
        "clip_img": torch.zeros(1, 1, 24),
    }
    halves: dict[str, Any] = {name: value.half() for name, value in prompt.items()}
    out = model.engine(x.half(), r, **halves)
    assert out.dtype == torch.float16
    assert relative_error(out.float(), network(x, r, **prompt)) <= 2e-2


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp16"])
def test_only_stage_c_in_fp16_is_held(tmp_path, dtype):
    stage_c = write(tmp_path, "stage_c", StageC.from_config(STAGE_C), STAGE_C)
    stage_b = write(tmp_path, "stage_b", StageB.from_config(STAGE_B), STAGE_B)
    held = stream_scale(load_network("stage_c", stage_c, dtype).network)
    assert held == (STREAM_SCALE if dtype == "fp16" else 1)
    assert stream_scale(load_network("stage_b", stage_b, dtype).network) == 1


@pytest.mark.parametrize(("has_bf16", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_on_a_card(monkeypatch, has_bf16, expected):
    card = ComputeDevice("cpu")
    card.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    assert card.weight_dtype("auto") == expected
    assert card.weight_dtype("fp8") == card.weight_dtype("int8") == expected
    assert card.weight_dtype("bf16") == torch.bfloat16
