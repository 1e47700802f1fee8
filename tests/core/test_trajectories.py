"""Whole runs of real networks: the published trajectories, and batches against single runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from cascade_nodes.cascade_core import StageB, StageC, load_published_state_dict
from cascade_nodes.cascade_core.diffusion.guidance import Guider
from cascade_nodes.cascade_core.diffusion.noise import NoiseSource
from cascade_nodes.cascade_core.diffusion.samplers import SAMPLERS, SamplerStep
from cascade_nodes.tests.core.sampling import sample_from

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = {"stage_c": StageC, "stage_b": StageB}
RUNS = {"stage_c": ["ddpm", "ddim", "lcm", "img2img", "nocfg"], "stage_b": ["ddpm"]}
SHAPE = (16, 6, 8)


def read(name: str):
    """(tensors, metadata) of a golden file"""
    with safe_open(GOLDEN / f"{name}.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return tensors, {key: json.loads(value) for key, value in file.metadata().items()}


def with_prefix(tensors: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def network(name: str):
    tensors, metadata = read(name)
    model = NETWORKS[name].from_config(metadata["config"])
    return load_published_state_dict(model, with_prefix(tensors, "weights.")).eval()


@pytest.fixture(scope="module")
def networks():
    return {name: network(name) for name in NETWORKS}


@pytest.fixture(scope="module")
def guider(networks):
    tensors, _ = read("sampling_stage_c")
    return Guider(
        networks["stage_c"], with_prefix(tensors, "cond."), with_prefix(tensors, "uncond."), 4.0, 0.7
    )


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    assert value.shape == reference.shape
    return ((value - reference).abs().max() / reference.abs().max()).item()


def test_every_golden_run_is_tested():
    for name, runs in RUNS.items():
        assert list(read(f"sampling_{name}")[1]["runs"]) == runs


@pytest.mark.parametrize(("name", "run"), [(name, run) for name in RUNS for run in RUNS[name]])
def test_trajectory_as_published(networks, name, run):
    tensors, metadata = read(f"sampling_{name}")
    settings = metadata["runs"][run]
    guider = Guider(
        networks[name],
        positive=with_prefix(tensors, "cond."),
        negative=None if settings["cfg"] is None else with_prefix(tensors, "uncond."),
        cfg=settings["cfg"] or 1.0,
        cfg_rescale=settings["cfg_rho"],
    )
    noise = iter(tensors[f"{run}.in.noise"])
    steps: list[SamplerStep] = []
    final = sample_from(
        guider,
        tensors[f"{run}.in.start"],
        steps=settings["steps"],
        shift=settings["shift"],
        sampler=run if run in SAMPLERS else "ddpm",
        noise=lambda: next(noise),
        t_start=settings["t_start"],
        callback=steps.append,
    )
    reference = tensors[f"{run}.out.steps"]
    assert len(steps) == len(reference) == settings["steps"]
    for step, expected in zip(steps, reference, strict=True):
        assert relative(step.x, expected) <= 1e-4
    assert torch.equal(final, steps[-1].x)


def test_t_end_stops_early(guider):
    tensors, _ = read("sampling_stage_c")
    noise = iter(tensors["ddpm.in.noise"])
    start, reference = tensors["ddpm.in.start"], tensors["ddpm.out.steps"]
    half = sample_from(
        guider, start, steps=3, shift=2.0, sampler="ddpm", noise=lambda: next(noise), t_start=1.0, t_end=0.5
    )
    assert relative(half, reference[2]) <= 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_equals_its_single_runs(guider, sampler):
    def run(indices: list[int]) -> torch.Tensor:
        noise = NoiseSource(42, indices, SHAPE)
        return sample_from(guider, noise.draw(), steps=5, shift=2.0, sampler=sampler, noise=noise.draw)

    batch = run([0, 1, 2])
    for index in range(3):
        single = run([index])
        assert relative(batch[index : index + 1], single) <= 1e-5
