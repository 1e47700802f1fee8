"""Relative error to float32 of a forward and of a whole trajectory, for the engine and for eager bf16."""

import copy
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from context import Context
from machine import print_table
from networks import TITLES, forward_inputs
from picture import BenchmarkPicture
from timing import clean, relative_error

STAGES = ("stage_c", "stage_b")


def measure(context: Context) -> dict[str, Any]:
    setup, errors = context.setup, {}
    picture = BenchmarkPicture(setup)
    prior: Tensor | None = None
    for kind in STAGES:
        x, r, values = forward_inputs(kind, setup, 2, setup.side)
        with exactly():
            with torch.inference_mode(False):
                exact: Any = copy.deepcopy(context.ours.network(kind)).float()
            forward = exact(x.float(), r, **{name: value.float() for name, value in values.items()})
            latents = _latents(picture, kind, exact, prior, torch.float32)
            del exact
            clean(setup.device)
        programs = {program.name: getattr(program, kind) for program in context.programs()}
        errors[kind] = {}
        for name, network in programs.items():
            with context.isolated(f"error, {TITLES[kind]}, {name}"):
                errors[kind][name] = {
                    "forward": relative_error(network(x, r, **values), forward),
                    "latent": relative_error(_latents(picture, kind, network, prior), latents),
                }
        prior = latents
    return errors


def _latents(
    picture: BenchmarkPicture,
    kind: str,
    network: Callable[..., Tensor],
    prior: Tensor | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Final latents of the trajectory; Stage B's starts at the same prior for all programs."""
    if kind == "stage_c":
        return picture.prior(network, dtype)
    assert prior is not None
    return picture.decoder(network, prior, dtype)


@contextmanager
def exactly():
    """Computes float32 products in float32, also in convolutions, which use TF32 by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def report(errors: dict[str, Any]) -> None:
    rows = [
        [f"{TITLES[kind]}, {name}", f"{error['forward']:.2e}", f"{error['latent']:.2e}"]
        for kind, programs in errors.items()
        for name, error in programs.items()
    ]
    print_table(["relative error to float32", "a forward", "the latent"], rows)
