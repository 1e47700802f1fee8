# pyright: reportMissingImports=false
"""MODEL in ComfyUI: a patcher with a subclass of its own Stable Cascade models, which wraps our network."""

from collections import deque
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_base
import comfy.model_management
import comfy.supported_models
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor

from ....cascade_core import checkpoints
from ....cascade_core.accelerators import is_nvidia
from ....cascade_core.checkpoints.carried import carried_config
from ....cascade_core.engine import Engine
from ....cascade_core.errors import CascadeError, quoted
from ....cascade_core.networks import activations
from ....cascade_core.networks.fp16 import STREAM_SCALE, scale_residual_stream, stream_scale
from ....cascade_core.networks.precision import PRECISIONS
from ....cascade_core.networks.quantisation import E4M3, FORMATS
from ....cascade_core.networks.stage_c import StageC
from ....cascade_core.networks.tiles import in_whole_patches
from ....cascade_core.networks.unet import UNet
from ....cascade_core.stages.device import DTYPES, check_eight_bit
from ....cascade_core.stages.diffusion import min_latent_side
from ..notices import Notice
from ..run import NetworkDescription
from .areas import count_in_pixels, wraps_the_network
from .conditions import LastingPrior, lasting, new_schedule
from .eight_bits import EightBitWeights
from .hosted import Hosted, WholeLayers
from .patcher import CascadePatcher
from .patches import (
    ATTENTION,
    NOTICES,
    NetworkSettings,
    Notices,
    OverriddenAttention,
    explain_failures,
    origin,
    without_effect,
)
from .progress import notify
from .residence import Residence
from .weights import remember_file

QUANTISING = 512 << 20  # most bytes of a card that quantising the largest matrix takes
GRAPHS = not getattr(comfy.cli_args.args, "disable_cuda_graphs", False)
WORKSPACE = 80 * 2**20  # most bytes that cuDNN takes for a convolution, at some sizes

# Keys in the host's transformer_options:
ENGINE = "cascade_engine"  # whether the engine is used
NOISE = "cascade_noise"  # a step's sigma and its noise condition, which saves reading them from the device


class HostedNetwork(Hosted):
    """Stage B or Stage C as ComfyUI calls a diffusion model.

    dtype  of its weights, except those in 8 bits
    name   of its file
    """

    def __init__(self, network: UNet, dtype: torch.dtype, name: str):
        super().__init__(network)
        self.dtype = dtype
        self.name = name
        self.engine = Engine(network, notify=notify)
        self.residence: Residence | None = None
        self.forward_bytes: deque[int] = deque(maxlen=2)  # as the host asked: for one prompt, then both
        # For the host's samplers: a run's sigmas, and the notices given to the user about it.
        self._told: tuple[Any, Notices] = (
            None,
            Notices(),
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Drops the engine's derived weights where the host moves the network as a whole."""
        self.engine.forget()
        return super()._apply(fn, recurse)

    def forward(
        self,
        x: Tensor,
        r: Tensor,
        context: Tensor | None = None,
        control: dict | None = None,
        transformer_options: dict | None = None,
        **conditions: Any,
    ) -> Tensor:
        """`conditions` are those returned by `extra_conds` below; `context` stays empty, as in the host's own."""
        options = transformer_options or {}
        for sentence in without_effect(options, self.words):
            self._notices(options).add(sentence)
        wrappers = get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options)
        run = WrapperExecutor.new_class_executor(self._forward, self, wrappers).execute
        return run(x, r, context, control, options, **conditions)

    def _forward(
        self,
        x: Tensor,
        r: Tensor,
        context: Tensor | None,
        control: dict | None,
        transformer_options: dict,
        **conditions: Any,
    ) -> Tensor:
        if isinstance(self.network, StageC):
            if control is not None:
                # The host's list is popped from its end, block after block.
                conditions["control"] = list(reversed(control.get("input", [])))
            # Set at each call, because the host's nodes may change the precision of a loaded MODEL.
            scale = STREAM_SCALE if x.dtype == torch.float16 else 1.0
            if stream_scale(self.network) != scale:
                scale_residual_stream(self.network, scale)
        side = self.network.config.patch_size
        return in_whole_patches(
            lambda patches: self._predict(patches, r, transformer_options, conditions), x, side
        )

    def _predict(self, x: Tensor, r: Tensor, options: dict, conditions: dict[str, Any]) -> Tensor:
        if self.residence is not None and self.residence.device.device == x.device:
            self.residence.open()
        if ATTENTION in options:
            self._without_engine(options, Notice("attention", node=origin(options[ATTENTION])))
            with OverriddenAttention(options):
                return self.network(x, r, **conditions)
        if not options.get(ENGINE, True):
            return self.network(x, r, **conditions)
        # Another thread may run a copy on another device at the same time, and only one may capture.
        self.engine.graphs = GRAPHS and "multigpu_thread_device" not in options
        sigma, noise = options.get(NOISE, (None, 0.0))
        if sigma is not None and sigma is options.get("sigmas") and not wraps_the_network(options):
            r = torch.full((len(r),), noise)
        # Compiled by torch it would be slower, and recompiled whenever weights move.
        engine: Any = torch.compiler.disable(self.engine) if torch.compiler.is_compiling() else self.engine
        out = engine(x, r, **conditions)
        if self.engine.replaced is not None:
            self._without_engine(options, Notice("layer", layer=self.engine.replaced))
        return out

    @property
    def words(self) -> str:
        return "Stage C" if isinstance(self.network, StageC) else "Stage B"

    def _without_engine(self, options: dict, notice: Notice) -> None:
        if options.get(ENGINE, True):
            self._notices(options).add(notice)

    def _notices(self, options: dict) -> Notices:
        """Notices of our sampler's run; or new ones for the host's samplers, whose nodes show them at once."""
        if NOTICES in options:
            return options[NOTICES]
        sigmas = options.get("sample_sigmas")
        if sigmas is None or sigmas is not self._told[0]:
            self._told = sigmas, Notices(notify)
        return self._told[1]


class PlacedModel:
    """Base of the host's models whose weights a `Residence` moves: state that all patchers of a model share."""

    casts = False  # whether layers cast or wrap their weights at a node's request

    def build(self, model_config: Any, build: Any, device: Any) -> None:
        """Builds what the host's classes build, but with our network and a schedule that takes no time."""
        model: Any = self
        types = comfy.model_base.ModelType  # EPS: predicts epsilon; its own schedule is made fast
        comfy.model_base.BaseModel.__init__(model, model_config, types.EPS, device=device, unet_model=build)
        model.model_type, model.model_sampling = types.STABLE_CASCADE, new_schedule(model_config)
        # Bypasses nn.Module, and nodes that wrap `diffusion_model` temporarily.
        model.__dict__["hosted"] = model.diffusion_model
        model.__dict__["eight_bits"] = EightBitWeights(model.diffusion_model)

    @property
    def residence(self) -> Residence | None:
        return self.__dict__["hosted"].residence

    @residence.setter
    def residence(self, value: Residence | None) -> None:
        hosted = self.__dict__["hosted"]
        if value is None:
            hosted.engine.placement = None
        hosted.residence = value

    def state_dict_for_saving(self, *state_dicts: Any, **more: Any) -> dict[str, Tensor]:
        """The tensors that ModelSave writes, with the scales of 8-bit weights and the network's configuration."""
        model: Any = self
        base: Any = super()
        tensors = base.state_dict_for_saving(*state_dicts, **more)
        beside = {**model.eight_bits.file_tensors(), **carried_config(model.hosted.network)}
        return {**tensors, **model.model_config.process_unet_state_dict_for_saving(beside)}


class StageCModel(PlacedModel, comfy.model_base.StableCascade_C):
    """Host's Stage C with our network and its widths."""

    def __init__(self, model_config, build, device=None):
        self.build(model_config, build, device)

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        values = {}
        if kwargs.get("pooled_output") is not None:
            values["clip_text_pooled"] = kwargs["pooled_output"]
        if kwargs.get("cross_attn") is not None:
            # Not as CONDCrossAttn: that repeats the shorter prompt to run both at once, and Stage C, which
            # attends to other tokens as well, would answer differently.
            values["clip_text"] = kwargs["cross_attn"]
        width = self.diffusion_model.clip_img_mapper.in_features
        values["clip_img"] = image_tokens(kwargs.get("unclip_conditioning") or [], width)
        return lasting(self, values, kwargs["device"])

    def memory_required(self, input_shape, cond_shapes=None) -> int:
        """Bytes of a forward pass beside the weights; the host adds shapes of all prompts that run at once."""
        config, batch = self.diffusion_model.network.config, input_shape[0]
        texts = [shape[1] for shape in (cond_shapes or {}).get("clip_text", [])] or [77]
        images = [shape[1] for shape in (cond_shapes or {}).get("clip_img", [])] or [1]
        tokens = max(texts) + config.c_clip_seq * (1 + max(images))
        height, width = input_shape[-2:]
        values = activations.stage_c(config, batch, height, width, tokens)
        return forward_bytes(value_bytes(self) * values, self.diffusion_model)

    def extra_conds_shapes(self, **kwargs) -> dict[str, list[int]]:
        """Shapes that `memory_required` needs before the run."""
        shapes = {}
        if kwargs.get("cross_attn") is not None:
            shapes["clip_text"] = list(kwargs["cross_attn"].shape)
        images = sum(
            len(prompt["clip_vision_output"].image_embeds)
            for prompt in kwargs.get("unclip_conditioning") or []
        )
        return {**shapes, "clip_img": [1, max(images, 1)]}


class StageBModel(PlacedModel, comfy.model_base.StableCascade_B):
    """Host's Stage B with our network."""

    def __init__(self, model_config, build, device=None):
        self.build(model_config, build, device)

    def extra_conds(self, **kwargs) -> dict[str, Any]:
        values = {}
        if kwargs.get("pooled_output") is not None:
            values["clip"] = kwargs["pooled_output"]
        prior = kwargs.get("stable_cascade_prior")
        if prior is None:
            channels = self.diffusion_model.network.config.c_effnet
            prior = torch.zeros(1, channels, 1, 1)  # of any size: the network resizes it
        values["effnet"] = prior
        conditions = lasting(self, values, kwargs["device"])
        patch_size = self.diffusion_model.network.config.patch_size
        conditions["effnet"] = LastingPrior.of_latent(conditions["effnet"].cond, kwargs["noise"], patch_size)
        return conditions

    def memory_required(self, input_shape, cond_shapes=None) -> int:
        """Bytes of a forward pass beside the weights."""
        config, batch = self.diffusion_model.network.config, input_shape[0]
        height, width = input_shape[-2:]
        values = activations.stage_b(config, batch, height, width)
        return forward_bytes(value_bytes(self) * values, self.diffusion_model)


def forward_bytes(values: int, network: HostedNetwork) -> int:
    """Bytes of a forward with these `values`, minus the bytes that the network's CUDA graphs already hold for them."""
    device = comfy.model_management.get_torch_device()
    size = values + min(WORKSPACE, values // 2) + network.engine.extra_bytes()
    network.forward_bytes.append(size)
    return max(size - network.engine.graph_bytes(device), 0)


def value_bytes(model: Any) -> int:
    """Bytes of one value in the precision that a model computes in."""
    return comfy.model_management.dtype_size(model.manual_cast_dtype or model.get_dtype())


HOST_CLASSES = {
    "stage_c": (StageCModel, comfy.supported_models.Stable_Cascade_C),
    "stage_b": (StageBModel, comfy.supported_models.Stable_Cascade_B),
}


def image_tokens(prompts: list[dict], width: int) -> Tensor:
    """Image embeddings times their strengths, concatenated: (1, images, width); zeros without any."""
    if not prompts:
        return torch.zeros(1, 1, width)
    embeds = [
        prompt["clip_vision_output"].image_embeds.unsqueeze(0) * prompt["strength"] for prompt in prompts
    ]
    return torch.cat(embeds, dim=1)


def load_network(kind: str, path: Path, dtype: str) -> Any:
    if dtype not in DTYPES:
        raise CascadeError(f"dtype {quoted(dtype)} is not known; choose {', '.join(DTYPES)}.")
    check_eight_bit(dtype, comfy.model_management.get_torch_device())
    return load_patcher(kind, str(path), dtype)


def load_patcher(kind: str, path: str, dtype: str, disable_dynamic: bool = False) -> Any:
    """Builds the patcher of a file. The host calls this again, by `cached_patcher_init`, for a second copy."""
    tensors, metadata = checkpoints.read_weights(path, kind)
    checkpoints.identify(path, tensors, metadata, kind)  # before precision or device are chosen
    model_class, config_class = HOST_CLASSES[kind]
    config = config_class({"stable_cascade_stage": kind[-1]})
    load_device = comfy.model_management.get_torch_device()
    supported = _computed_in(kind, config, load_device)
    weight_dtype = _weight_dtype(tensors, dtype, supported)
    eight_bit = FORMATS.get(dtype, E4M3 if weight_dtype == E4M3 else None)
    quantise_on = None
    if eight_bit is not None:
        # The other weights get the precision that the host would cast such weights to.
        weight_dtype = comfy.model_management.unet_manual_cast(E4M3, load_device, supported)
        if is_nvidia(load_device):
            comfy.model_management.free_memory(QUANTISING, load_device)
            quantise_on = load_device
    cast = comfy.model_management.unet_manual_cast(weight_dtype, load_device, supported)
    config.set_inference_dtype(weight_dtype, cast)
    config.unet_config = NetworkSettings(config.unet_config, checkpoints.KIND_NAMES[kind])

    def build(operations: Any, **ignored: Any) -> HostedNetwork:
        network: Any  # StageB or StageC
        network, _, _ = checkpoints.load_model(
            path,
            expect=kind,
            dtype=weight_dtype,
            operations=WholeLayers(operations),
            notify=notify,
            eight_bit=eight_bit,
            quantise_on=quantise_on,
        )
        return HostedNetwork(network, weight_dtype, Path(path).name)

    model = model_class(config, build)
    offload_device = comfy.model_management.unet_offload_device()
    if not comfy.model_management.is_device_cpu(offload_device):
        model.to(offload_device)
    patcher = CascadePatcher(model, load_device=load_device, offload_device=offload_device)
    count_in_pixels(patcher)
    explain_failures(patcher, checkpoints.KIND_NAMES[kind])
    model.hosted.engine.compile_in_background(load_device)
    remember_file(patcher, f"{Path(path).name} ({checkpoints.KIND_NAMES[kind]})")
    patcher.cached_patcher_init = (load_patcher, (kind, path, dtype))
    return patcher


def _computed_in(kind: str, config: Any, device: torch.device) -> list[torch.dtype]:
    """Precisions that the host may compute a network in, the best first.

    The host does not run Stage C in fp16, where its own network overflows. Ours does not overflow, so fp16 serves
    cards without bf16, and --force-fp16.
    """
    supported = config.supported_inference_dtypes
    if kind == "stage_c" and (
        comfy.cli_args.args.force_fp16 or not comfy.model_management.should_use_bf16(device)
    ):
        return [torch.float16, *supported]
    return supported


def _weight_dtype(tensors: dict[str, Tensor], name: str, supported: list[torch.dtype]) -> torch.dtype:
    """Dtype of the weights: the chosen one, or the host's default for such a file."""
    if name in PRECISIONS:
        return PRECISIONS[name]
    return comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(tensors),
        supported_dtypes=supported,
        weight_dtype=comfy.utils.weight_dtype(tensors),
    )


# Layers that show a network's input widths; they have the same names in our networks and the host's.
WIDTH_LAYERS = {
    "stage_c": {"text": "clip_txt_mapper", "pooled": "clip_txt_pooled_mapper", "image": "clip_img_mapper"},
    "stage_b": {"pooled": "clip_mapper"},
}


def describe_network(model: Any) -> NetworkDescription:
    """Describes our and the host's own Stage B and C; anything else by its class."""
    base = getattr(model, "model", None)
    kind = None
    if isinstance(base, comfy.model_base.StableCascade_C):
        kind = "stage_c"
    elif isinstance(base, comfy.model_base.StableCascade_B):
        kind = "stage_b"
    if base is None or kind is None:
        return NetworkDescription(None, f"a {type(base if base is not None else model).__name__} model", {})
    network = base.diffusion_model
    widths = {
        width_name: getattr(network, layer).in_features for width_name, layer in WIDTH_LAYERS[kind].items()
    }
    words = checkpoints.KIND_NAMES[kind]
    name, min_side = f"the {words} MODEL", 1
    if isinstance(network, HostedNetwork):
        name, min_side = f"{network.name} ({words})", min_latent_side(kind, network.network.config)
    return NetworkDescription(kind, name, widths, base.latent_format.latent_channels, min_side)
