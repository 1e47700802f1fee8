"""Our subset of the node API against ComfyUI 0.3.64's own description of the same nodes (comfyui.json)."""

import json
from pathlib import Path
from typing import Any

import pytest

from cascade_nodes.nodes.hosts import schema as io
from cascade_nodes.tests.headless.toy_nodes import TOYS

RECORD = json.loads((Path(__file__).parent / "comfyui.json").read_text())["object_info"]


@pytest.mark.parametrize("name", TOYS)
def test_same_object_info_as_comfyui(name):
    assert json.loads(json.dumps(TOYS[name].GET_NODE_INFO_V1())) == RECORD[name]


def test_the_record_covers_every_toy():
    assert RECORD.keys() == TOYS.keys()


def test_types_keep_their_names():
    names = {
        "Model": "MODEL", "Clip": "CLIP", "Vae": "VAE", "ClipVision": "CLIP_VISION",
        "ClipVisionOutput": "CLIP_VISION_OUTPUT", "ControlNet": "CONTROL_NET", "Conditioning": "CONDITIONING",
        "Latent": "LATENT", "Image": "IMAGE", "Mask": "MASK", "Sampler": "SAMPLER", "Sigmas": "SIGMAS",
        "Int": "INT", "Float": "FLOAT", "String": "STRING", "Boolean": "BOOLEAN", "Combo": "COMBO",
    }  # fmt: skip
    for name, io_type in names.items():
        socket = getattr(io, name)
        assert (socket.io_type, socket.Input.io_type, socket.Output.io_type) == (io_type,) * 3
        assert socket.Input("x").get_io_type() == io_type


def test_a_keyword_that_the_oldest_comfyui_does_not_know_is_refused():
    newer: list[tuple[Any, str]] = [
        (io.Schema, "search_aliases"),
        (io.Int.Input, "advanced"),
        (io.Combo.Input, "force_input"),
    ]
    for create, keyword in newer:
        with pytest.raises(TypeError, match=keyword):
            create("a", **{keyword: True})


def test_ids_must_differ():
    class Twice(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(node_id="Twice", inputs=[io.Int.Input("a")], outputs=[io.Int.Output("a")])

    with pytest.raises(ValueError, match=r"\['a'\] are not"):
        Twice.GET_SCHEMA()


def test_unnamed_outputs_may_have_the_same_type():
    schema = io.Schema(node_id="A", outputs=[io.Int.Output(), io.Int.Output()])
    schema.finalize()
    schema.validate()
    assert [output.id for output in schema.outputs] == ["_0_INT_", "_1_INT_"]


def test_outputs_are_reached_by_index():
    output = io.NodeOutput(1, 2, ui={"text": ["a"]})
    assert (output[0], output[1], output.result, output.ui) == (1, 2, (1, 2), {"text": ["a"]})
    assert io.NodeOutput().result is None
