"""How far from float32 a forward and a whole trajectory are, of the same weights: the engine, and eager bf16 itself."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench import Bench
from loop import Picture
from machine import print_table
from networks import TITLES, forward_inputs
from timing import clean, relative_error

STAGES = ("stage_c", "stage_b")


def measure(bench: Bench) -> dict[str, Any]:
    setup, found = bench.setup, {}
    picture = Picture(setup)
    prior: Tensor | None = None
    for kind in STAGES:
        x, r, given = forward_inputs(kind, setup, 2, setup.side)
        with exactly():
            with torch.inference_mode(False):
                exact: Any = copy.deepcopy(bench.ours.network(kind)).float()
            forward = exact(x.float(), r, **{name: value.float() for name, value in given.items()})
            latents = _latents(picture, kind, exact, prior, torch.float32)
            del exact
            clean(setup.device)
        programs = {program.name: getattr(program, kind) for program in bench.programs()}
        found[kind] = {}
        for name, network in programs.items():
            with bench.apart(f"error, {TITLES[kind]}, {name}"):
                found[kind][name] = {
                    "forward": relative_error(network(x, r, **given), forward),
                    "latent": relative_error(_latents(picture, kind, network, prior), latents),
                }
        prior = latents
    return found


def _latents(
    picture: Picture,
    kind: str,
    network: Callable[..., Tensor],
    prior: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The end of the trajectory; Stage B's starts at the same prior for all."""
    if kind == "stage_c":
        return picture.prior(network, dtype)
    assert prior is not None
    return picture.decoder(network, prior, dtype)


@contextmanager
def exactly():
    """float32 products in float32, also in convolutions, which are not by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def report(found: dict[str, Any]) -> None:
    rows = [
        [f"{TITLES[kind]}, {name}", f"{of['forward']:.2e}", f"{of['latent']:.2e}"]
        for kind, programs in found.items()
        for name, of in programs.items()
    ]
    print_table(["relative error to float32", "a forward", "the latent"], rows)
