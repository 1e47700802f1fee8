"""ComfyUI started with other flags: the picture is what the precision allows, errors are as clear as ever; and previews
are shown only where they are asked for.
"""

import numpy as np
import pytest

from cascade_nodes.tests.comfyui.checkout import Server
from cascade_nodes.tests.comfyui.client import Client
from cascade_nodes.tests.comfyui.conftest import prepare
from cascade_nodes.tests.comfyui.graphs import PRIOR, tiny

# By how much of 255 the flags change the picture on average, at least and at most. (--lowvram needs a graphics card:
# ComfyUI refuses it beside --cpu.)
FLAGS = {"--force-fp16": (0, 0.1), "--fp8_e4m3fn-unet": (0.5, 5)}


@pytest.mark.parametrize("flag", FLAGS)
def test_comfyui_started_with(checkout, tmp_path, right_picture, flag):
    graph = tiny({"7.seed": 4, "7.sampler": "ddim", "8.sampler": "ddim"})
    least, most = FLAGS[flag]
    no_previews = [flag, "--preview-method", "none"]
    with Server(checkout, prepare(tmp_path), *no_previews) as server, Client(server) as client:
        for _ in range(2):
            execution = client.run(graph)
            assert execution.previews == []
            (picture,) = client.pictures(execution)
            difference = np.abs(picture.astype(int) - right_picture(graph))
            assert least <= difference.mean() <= most
            execution = client.run(tiny({"7.model": ["2", 0]}))
            assert [data["node_id"] for data in execution.of("execution_error")] == [PRIOR]
            assert execution.error is not None
            assert "tiny_stage_b.safetensors (Stage B), but Stage C is expected" in execution.error
            status, answer = client.post("/prompt", {"prompt": tiny({"6.width": 100})})
            assert status == 400
            details = [error["details"] for error in answer["node_errors"]["6"]["errors"]]
            assert any(
                "the size is 100 × 64, but each side must be a multiple of 8" in text for text in details
            )
            graph = tiny({**{f"{node_id}.sampler": "ddim" for node_id in "78"}, "7.seed": 5})
