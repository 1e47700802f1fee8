# pyright: reportMissingImports=false
"""Stage B in tiles inside ComfyUI: a MODEL that predicts tile by tile and asks for a tile's memory."""

from typing import Any

import comfy.model_management
import comfy.patcher_extension
from torch import Tensor

from ....cascade_core.networks.tiles import predict_in_tiles


def in_tiles(patcher: Any, tile_positions: int) -> Any:
    """Returns the Stage B MODEL, ours or the host's own, with tiles of `tile_positions` latent positions a side.

    The host calls it once for all prompts that it runs together, as before. A wrapper that another node has set is
    called around the tiles.
    """
    patched = patcher.clone()
    outer = patched.model_options.get("model_function_wrapper")
    patch_size = patcher.model.diffusion_model.embedding[0].downscale_factor

    def run(apply_model, values: dict[str, Any]) -> Tensor:
        def tiled_model(x: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
            def predict(tile: Tensor, effnet: Tensor) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                return apply_model(tile, timestep, **{**conditions, "effnet": effnet})

            return predict_in_tiles(predict, x, conditions["effnet"], tile_positions, patch_size)

        if outer is not None:
            return outer(tiled_model, values)
        return tiled_model(values["input"], values["timestep"], **values["c"])

    def prepare(execute, model: Any, noise_shape, *arguments: Any, **options: Any) -> Any:
        batch, channels, *sides = noise_shape
        return execute(
            model, [batch, channels, *(min(side, tile_positions) for side in sides)], *arguments, **options
        )

    patched.set_model_unet_function_wrapper(run)
    patched.add_wrapper(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, prepare)
    return patched
