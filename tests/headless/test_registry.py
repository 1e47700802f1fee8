import asyncio

import pytest

from cascade_nodes.headless.builtin import BUILTIN_NODES, LoadImage
from cascade_nodes.headless.graph import execution_order
from cascade_nodes.headless.registry import available_nodes, by_id, describe, finish
from cascade_nodes.nodes.extension import CascadeExtension


def test_our_nodes_and_those_of_comfyuis_that_run_here():
    ours = finish(CascadeExtension().get_node_list())
    nodes = available_nodes()
    assert len(nodes) == len(ours) + len(BUILTIN_NODES)
    assert set(ours) | set(BUILTIN_NODES) == set(nodes.values())
    assert {"LoadImage", "LoadImageMask", "SaveImage", "PreviewImage"} <= nodes.keys()
    assert all(describe(cls).cls is cls for cls in nodes.values())


def test_an_id_is_given_once():
    with pytest.raises(RuntimeError, match="LoadImage and LoadImage have the same node id 'LoadImage'"):
        by_id([LoadImage, LoadImage])


def test_coroutines_finish_inside_a_running_loop_too():
    async def answer():
        return 42

    async def notebook():
        return finish(answer())

    assert asyncio.run(notebook()) == 42


def test_loaders_run_just_before_their_first_use():
    sources = {
        "save": ["decode"],
        "decode": ["vae", "stage_b"],
        "stage_b": ["model_b", "prompt", "stage_c"],
        "stage_c": ["model_c", "prompt", "latent"],
        "prompt": ["clip"],
        **{name: [] for name in ("vae", "model_b", "model_c", "latent", "clip", "unused")},
    }
    order = ["clip", "prompt", "model_c", "latent", "stage_c", "model_b", "stage_b", "vae", "decode", "save"]
    assert execution_order(sources, ["save", "stage_b"]) == order
    assert execution_order(sources, ["unused", "prompt"]) == ["unused", "clip", "prompt"]
