# pyright: reportMissingImports=false
"""Stage B in tiles inside ComfyUI: a MODEL that predicts tile by tile and asks for a tile's memory.

Also pads latents whose sides are not whole patches, which the host's own Stage B cannot process.
"""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import comfy.patcher_extension
from torch import Tensor

from ....cascade_core.networks.tiles import in_whole_patches, predict_in_tiles


def in_tiles(patcher: Any, tile_positions: int, sides: Sequence[int]) -> Any:
    """Returns the Stage B MODEL, ours or the host's own, for a latent with these sides.

    tile_positions: side of its tiles, in latent positions; 0: whole.
    The host calls it once for all prompts that it runs together, as without tiles. A wrapper set by another node is
    called once, around all tiles.
    """
    patch_size = patcher.model.diffusion_model.embedding[0].downscale_factor
    if not tile_positions and not any(side % patch_size for side in sides):
        return patcher
    tile_positions = tile_positions or max(sides)
    patched = patcher.clone()
    outer = patched.model_options.get("model_function_wrapper")

    def run(apply_model, values: dict[str, Any]) -> Tensor:
        def tiled_model(x: Tensor, timestep: Tensor, **conditions: Any) -> Tensor:
            def predict(tile: Tensor, effnet: Tensor) -> Tensor:
                comfy.model_management.throw_exception_if_processing_interrupted()
                return in_whole_patches(
                    lambda patches: apply_model(patches, timestep, **{**conditions, "effnet": effnet}),
                    tile,
                    patch_size,
                )

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
