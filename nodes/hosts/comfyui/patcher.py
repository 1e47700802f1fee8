# pyright: reportMissingImports=false
"""ComfyUI's patcher of Stage B and C: its memory manager decides how many bytes, our placement which weights.

The manager asks a patcher to load in so many bytes, to give some back, or to leave. It may ask any clone of a MODEL
in place of another, so all state of the weights belongs to their BaseModel (`residence`). ComfyUI's own handling of
weights is replaced entirely: it would copy resident weights to main memory, write hooks into the mapped file, and
cast, layer by layer, the weights that the engine reads.
"""

import logging

import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ....cascade_core.accelerators import is_nvidia
from .eight_bits import FloatState
from .patches import (
    CLONED_BY,
    NOTICES,
    cloning_node,
    has_foreign_schedule,
    left_as_it_was,
    origin,
    unread_by_network,
)
from .progress import notify
from .residence import Residence, card_loader
from .weight_patches import PREFIX, PatchedWeight

BATCH_MARGIN = 1.5  # ComfyUI runs both prompts at once if this many times their memory is free
ENDLESS = 1e30  # bytes; above it, ComfyUI's number means that memory does not matter


class CascadePatcher(comfy.model_patcher.ModelPatcher):
    """ModelPatcher of a `PlacedModel`.

    Without an NVIDIA card, or where all models stay on it (--highvram, --gpu-only), it is ComfyUI's own.
    """

    _free_bytes: int | None = None  # of the card, when the run began

    def residence(self) -> Residence | None:
        """The residence of this model's weights, if our placement moves them to this patcher's device."""
        model, present = self.model, self.model.residence
        if present is not None and present.load_device == self.load_device != self.offload_device:
            return present
        if present is not None:
            present.release()
            model.residence = None
            self._count_none()
        model.residence = self._new_residence()
        return model.residence

    def _new_residence(self) -> Residence | None:
        """A residence for the weights; None without an NVIDIA card, and where all models stay on it."""
        if not is_nvidia(self.load_device) or self.load_device == self.offload_device:
            return None
        # The host's own patcher may have loaded the weights while this patcher was for the CPU.
        self.model.eight_bits.unpatch()
        if self.backup or self.model.current_weight_patches_uuid is not None:
            super().unpatch_model(self.offload_device, unpatch_weights=True)
        loader = card_loader(self.load_device)
        return Residence(self.model.hosted, self.load_device, loader.device, loader)

    def clone(self, *arguments, **options):
        clone = super().clone(*arguments, **options)
        setattr(clone, CLONED_BY, cloning_node())
        return clone

    # Loading

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        residence = self.residence()
        if residence is None:
            return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)
        before = residence.bytes
        with self.use_ejected(skip_and_inject_on_exit_only=True):
            self.unpatch_model(self.offload_device, unpatch_weights=False)
            self.patch_model(load_weights=False)
            self._place(residence, device_to, self._room(residence, extra_memory), force_patch_weights)
        return residence.bytes - before

    def load(self, device_to=None, lowvram_model_memory=0, force_patch_weights=False, full_load=False):
        residence = self.residence()
        if residence is None:
            eight_bits = self.model.eight_bits
            eight_bits.unwrap()  # as the host does for its own layers
            super().load(device_to, lowvram_model_memory, force_patch_weights, full_load)
            for key in self.patches:
                if eight_bits.holds(key) and not (key in eight_bits.steps or key in self.backup):
                    self.patch_weight_to_device(key)  # for a layer that stays in main memory
            return
        with self.use_ejected():
            room = float("inf") if full_load else lowvram_model_memory
            self._place(residence, device_to or self.load_device, room, force_patch_weights)

    def _place(self, residence: Residence, device: torch.device, room: float, patch_host: bool) -> None:
        try:
            residence.place(room, self.patches)
            self._set_casts()
            if patch_host:
                residence.patch_host()
        except BaseException:
            self.detach()
            raise
        self.current_hooks = None
        self.model.device = device
        self.model.current_weight_patches_uuid = self.patches_uuid
        self._count(residence)
        loaded, size = residence.bytes / 2**20, self.model_size() / 2**20
        logging.info("%s: %.0f of %.0f MB on the card", self.model.hosted.name, min(loaded, size), size)
        for callback in self.get_all_callbacks(CallbacksMP.ON_LOAD):
            callback(self, device, room, patch_host, not residence.streamed)
        self.apply_hooks(self.forced_hooks, force_apply=True)

    def _room(self, residence: Residence, extra: float) -> float:
        """Bytes for weights, from `extra`, the bytes that the manager offers beside the loaded ones.

        The manager keeps its minimum (0.8 GiB) free for a forward, although our graphs already hold part of that
        forward's memory; without this correction, a second run had less room than the first. The manager also
        reserves memory for a forward of one prompt only, but with memory for both prompts at once, streamed weights
        are copied half as often.
        """
        if extra >= ENDLESS:
            return float("inf")
        management, graphs = comfy.model_management, residence.graph_bytes
        needs = self.model.hosted.forward_bytes or [0]
        least = management.minimum_inference_memory() - management.extra_reserved_memory()
        loaded, free = residence.bytes, management.get_free_memory(self.load_device)
        # Where memory is short, the manager offers 0 instead of less, and a credit on top would not exist.
        extra = min(extra, free - management.minimum_inference_memory())
        credit = max(0, graphs - max(0, min(needs) - least))
        together = loaded + free - BATCH_MARGIN * max(0, max(needs) - graphs)
        return min(loaded + extra + credit, together)

    def _count(self, residence: Residence) -> None:
        """Sets the attributes that the host reads from a loaded model."""
        self.model.model_loaded_weight_memory = residence.bytes
        self.model.model_lowvram = bool(residence.streamed)
        self.model.lowvram_patch_counter = residence.streamed_patches

    def _count_none(self) -> None:
        """Sets the attributes that the host reads from a model that is not loaded."""
        self.model.model_loaded_weight_memory = self.model.lowvram_patch_counter = 0
        self.model.model_lowvram = False
        self.model.current_weight_patches_uuid = None
        self.model.device = self.offload_device

    def _set_casts(self) -> None:
        """Makes layers cast or wrap their weights at a node's request, as the host's own loading does."""
        wrappers, force = self.weight_wrapper_patches, self.force_cast_weights
        if not (wrappers or force or self.model.casts):
            return
        self._clear_casts()
        for name, layer in self.model.named_modules():
            if hasattr(layer, "weight_function"):
                functions = [wrappers.get(f"{name}.{each}", []) for each in ("weight", "bias")]
                layer.comfy_force_cast_weights = force
                if hasattr(layer, "comfy_cast_weights") and (force or any(functions)):
                    layer.prev_comfy_cast_weights = layer.comfy_cast_weights
                    layer.comfy_cast_weights = True
                layer.weight_function, layer.bias_function = map(list, functions)
        self.model.casts = bool(wrappers or force)

    def _clear_casts(self) -> None:
        if self.model.casts:
            for layer in self.model.modules():
                comfy.model_patcher.wipe_lowvram_weight(layer)
            self.model.casts = False

    def model_size(self):
        if not self.size:
            self.size = super().model_size() + self.model.eight_bits.scale_bytes
        return self.size

    def loaded_size(self):
        residence = self.model.residence
        return super().loaded_size() if residence is None else residence.bytes

    # Leaving

    def partially_unload(self, device_to, memory_to_free=0, **options):
        residence = self.residence()
        if residence is None:
            return super().partially_unload(device_to, memory_to_free, **options)
        with self.use_ejected():
            freed = residence.shrink(int(memory_to_free))
            if options.get("force_patch_weights"):
                residence.patch_host()
        self._count(residence)
        logging.info("%s: %.0f MB given back", self.model.hosted.name, freed / 2**20)
        return freed

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        residence = self.residence() if unpatch_weights else None
        if residence is None:
            if unpatch_weights:
                self.model.eight_bits.unpatch()
            super().unpatch_model(device_to, unpatch_weights)
            return
        self.eject_model()
        residence.release()
        self._clear_casts()
        self._count_none()
        self.current_hooks = None
        super().unpatch_model(device_to, unpatch_weights=False)

    # Hooks: LoRAs of parts of a run or of a picture

    def patch_hooks(self, hooks):
        residence = self.residence()
        if residence is None:
            if hooks is not None or self.hook_backup:
                self.model.hosted.engine.forget()  # the next lines write into weights whose versions stay
            super().patch_hooks(hooks)
            self.model.eight_bits.hook({} if hooks is None else self.get_combined_hook_patches(hooks))
            return
        with self.use_ejected():
            residence.hook({} if hooks is None else self.get_combined_hook_patches(hooks))
            self.current_hooks = hooks

    def unpatch_hooks(self, whitelist_keys_set=None):
        if self.model.residence is None:
            if self.hook_backup:
                self.model.hosted.engine.forget()
            if not whitelist_keys_set:
                self.model.eight_bits.unhook()
            super().unpatch_hooks(whitelist_keys_set)
        else:
            self.patch_hooks(None)

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *arguments, **options):
        if key not in self.model.eight_bits.layers:
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *arguments, **options)

    # Weights, for merging and saving

    def get_key_patches(self, filter_prefix=None):
        keyed = super().get_key_patches(filter_prefix)
        residence = self.residence()
        if residence is not None:
            for key, patches in keyed.items():
                unpatched = residence.host_tensor(key.removeprefix(PREFIX))
                if unpatched is not None:
                    patches[0] = (unpatched, patches[0][1])
        for key in keyed.keys() & self.model.eight_bits.layers.keys():
            keyed[key][0] = self.model.eight_bits.original(key)
        return keyed

    def model_state_dict(self, filter_prefix=None):
        """The host's state dict, with 8-bit weights as float32, since the host's nodes compute with them."""
        tensors, eight_bits = super().model_state_dict(filter_prefix), self.model.eight_bits
        if not eight_bits.layers:
            return tensors
        patches = self.patches if self.model.current_weight_patches_uuid == self.patches_uuid else {}
        return FloatState(
            tensors,
            eight_bits.layers,
            lambda key: eight_bits.values(key, patches.get(key, ()), self.load_device),
        )

    def patch_weight_to_device(
        self, key, device_to=None, inplace_update=False, return_weight=False, **options
    ):
        residence, eight_bits = self.residence(), self.model.eight_bits
        if key in eight_bits.layers:
            steps = self.patches.get(key, ())
            if return_weight:
                return eight_bits.values(key, steps, device_to)
            if residence is None and steps:
                eight_bits.patch(key, steps, device_to)
            return None
        weight = None if residence is None else residence.host_tensor(key.removeprefix(PREFIX))
        if weight is None:
            return super().patch_weight_to_device(
                key,
                device_to,
                inplace_update,
                **({"return_weight": True} if return_weight else {}),
                **options,
            )
        # Loaded weights are already patched.
        return self._patched(key, weight, device_to) if return_weight else None

    def _patched(self, key: str, weight: Tensor, device: torch.device | None) -> Tensor:
        if key not in self.patches:
            return weight
        moved = weight if device is None else weight.to(device)
        return PatchedWeight(key, self.patches[key], weight).apply(moved)

    # Runs

    def pre_run(self):
        self._free_bytes = None
        super().pre_run()
        if NOTICES not in self.model_options["transformer_options"]:  # the host's own sampler
            if has_foreign_schedule(self):
                node = origin(type(self.get_model_object("model_sampling")))
                notify(
                    f"{node} put a schedule on the MODEL that is not Stable Cascade's, which its networks were not "
                    "trained on, so that no picture can come of it: take it out of the graph."
                )
            network = self.model.hosted.words
            for sentence in (*unread_by_network(self, network), *left_as_it_was(self, network)):
                notify(sentence)

    def cleanup(self):
        if self.model.residence is not None:
            self.model.residence.close()
        self._free_bytes = None
        super().cleanup()

    def get_free_memory(self, device):
        """Free bytes, measured once a run, so that all its steps run the same number of prompts at once."""
        if device != self.load_device:
            return super().get_free_memory(device)
        if self._free_bytes is None:
            self._free_bytes = super().get_free_memory(device)
        return self._free_bytes
