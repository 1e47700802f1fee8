"""Layouts: other programs' names for the tensors of the published networks, one small two-way table each.

A file is recognised by its names alone. Published names, with the attention input split or fused, pass unchanged.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import CascadeError, printable
from .attention import split_attention

# Prefixes, one or several, that programs put before all names of a network: data-parallel training, trainers,
# pipelines and ComfyUI.
WRAPPERS = ("module", "model", "diffusion_model", "generator", "prior", "decoder")
# Parts that torch inserts anywhere in names: torch.compile, and sharded or checkpointed training.
_WRAPPED_MODULES = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")

# For each part, a tensor by its published name that all of its networks have, and those of no other part.
SIGNATURES = {
    "stage_c": "clip_txt_mapper.weight",
    "stage_b": "effnet_mapper.0.weight",
    "stage_a": "vquantizer.codebook.weight",
    "controlnet": "projections.0.0.weight",
    "compressor": "mapper.0.weight",
    "previewer": "blocks.24.weight",
    "text": "text_model.embeddings.token_embedding.weight",
    "vision": "vision_model.embeddings.patch_embedding.weight",
}


@dataclass(frozen=True)
class Layout:
    """Names of one program for the tensors of one network.

    prefix      before every name
    renamed     pairs of parts of names: theirs, published
    transposed  published names of matrices that are stored the other way round
    ignored     names after the prefix that are constants of the program, not weights
    needed      names after the prefix that a file of this layout must have
    """

    name: str
    prefix: str = ""
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    needed: tuple[str, ...] = ()

    def published_name(self, name: str) -> str | None:
        """The published name of a name in this layout; None for a name outside of the network."""
        name = without_wrapped_modules(name)
        if not name.startswith(self.prefix) or name.removeprefix(self.prefix) in self.ignored:
            return None
        name = name.removeprefix(self.prefix)
        for theirs, published in self.renamed:
            name = name.replace(theirs, published)
        return name

    def to_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of this network in a file, under published names, as views.

        Raises CascadeError for two tensors with the same published name.
        """
        renamed = {}
        for name, tensor in tensors.items():
            published = self.published_name(name)
            if published is None:
                continue
            if published in renamed:
                raise CascadeError(
                    f"{printable(published)} stands twice, once as {printable(name)}; choose a file that holds the "
                    "network once."
                )
            turned = published in self.transposed and tensor.ndim == 2
            renamed[published] = tensor.T if turned else tensor
        return renamed

    def from_published(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Inverse of `to_published`, with the attention input split."""
        renamed = {}
        for published, tensor in split_attention(tensors).items():
            renamed[self.their_name(published)] = tensor.T if published in self.transposed else tensor
        return renamed

    def their_name(self, published: str) -> str:
        """Inverse of `published_name`, of a name with the attention input split."""
        for theirs, ours in reversed(self.renamed):
            published = published.replace(ours, theirs)
        return self.prefix + published

    def holds(self, part: str, names: Iterable[str]) -> bool:
        """Whether names are of this layout and hold that part."""
        names = set(names)
        marked = not self.renamed or any(theirs in name for name in names for theirs, _ in self.renamed)
        whole = all(self.prefix + name in names for name in self.needed)
        return whole and marked and any(self.published_name(name) == SIGNATURES[part] for name in names)


_ATTENTION = (
    ("attention.to_q.", "attention.attn.to_q."),
    ("attention.to_k.", "attention.attn.to_k."),
    ("attention.to_v.", "attention.attn.to_v."),
    ("attention.to_out.0.", "attention.attn.out_proj."),
)


def _comfyui_clip(name: str, prefix: str) -> tuple[Layout, Layout]:
    """ComfyUI's names for CLIP's text half: with OpenCLIP's projection, a bare matrix, or with Hugging Face's."""
    text_model = ("transformer.text_model.", "text_model.")
    open_clip = Layout(
        name,
        prefix,
        renamed=(text_model, ("text_projection", "text_projection.weight")),
        transposed=("text_projection.weight",),
        ignored=("logit_scale", "transformer.text_projection.weight"),
        needed=("text_projection",),
    )
    hugging_face = Layout(
        name,
        prefix,
        renamed=(text_model, ("transformer.text_projection.", "text_projection.")),
        ignored=("logit_scale",),
    )
    return open_clip, hugging_face


PUBLISHED = Layout("published")
ALL_IN_ONE = "ComfyUI all-in-one"
DIFFUSERS = "diffusers"
_ALL_IN_ONE_UNET = "model.diffusion_model."
_DIFFUSERS_STAGE_B = (*_ATTENTION, ("clip_txt_pooled_mapper.", "clip_mapper."))

# Tried in this order. Layouts that rename something come first, since those names identify them.
LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "stage_c": (
        Layout(DIFFUSERS, renamed=_ATTENTION),
        Layout("diffusers in an all-in-one", _ALL_IN_ONE_UNET, renamed=_ATTENTION),
        Layout(ALL_IN_ONE, _ALL_IN_ONE_UNET),
        PUBLISHED,
    ),
    "stage_b": (
        Layout(DIFFUSERS, renamed=_DIFFUSERS_STAGE_B),
        Layout("diffusers in an all-in-one", _ALL_IN_ONE_UNET, renamed=_DIFFUSERS_STAGE_B),
        Layout(ALL_IN_ONE, _ALL_IN_ONE_UNET),
        PUBLISHED,
    ),
    "stage_a": (
        Layout(DIFFUSERS, renamed=(("vquantizer.embedding.", "vquantizer.codebook."),)),
        Layout(ALL_IN_ONE, "vae."),
        PUBLISHED,
    ),
    "controlnet": (PUBLISHED,),
    "compressor": (
        Layout(ALL_IN_ONE, "vae.encoder.", ignored=("mean", "std")),
        Layout("ComfyUI coder", "encoder.", ignored=("mean", "std")),
        PUBLISHED,
    ),
    "previewer": (
        Layout(ALL_IN_ONE, "vae.previewer."),
        Layout("ComfyUI coder", "previewer."),
        PUBLISHED,
    ),
    "text": (
        *_comfyui_clip(ALL_IN_ONE, "text_encoder.clip_g."),
        *_comfyui_clip("ComfyUI", "clip_g."),
        PUBLISHED,
    ),
    "vision": (Layout(ALL_IN_ONE, "clip_l_vision."), PUBLISHED),
}


def layout_named(part: str, name: str) -> Layout:
    """The first layout of that name, such as ALL_IN_ONE, for a part. Raises KeyError where the part has none."""
    for layout in LAYOUTS[part]:
        if layout.name == name:
            return layout
    raise KeyError(name)


def all_in_one_name(part: str, published: str) -> str:
    """The name of a part's tensor in ComfyUI's all-in-one checkpoints."""
    layouts = (layout for layout in LAYOUTS[part] if layout.name == ALL_IN_ONE and not layout.transposed)
    return next(layouts).their_name(published)


def parts_in(names: Iterable[str]) -> dict[str, Layout]:
    """The networks that a file with these names holds, each with its layout; its prefix includes WRAPPERS.

    Raises CascadeError for a file that holds a network twice, under several prefixes.
    """
    names = [without_wrapped_modules(name) for name in names]
    wrapped: dict[str, list[str]] = {}  # by the prefix of the network's own names
    for name in names:
        words = name.split(".")
        count = next((number for number, word in enumerate(words) if word not in WRAPPERS), 0)
        if count:
            wrapped.setdefault(".".join(words[:count]) + ".", []).append(".".join(words[count:]))
    parts = {}
    for part in LAYOUTS:
        layout = _layout_of(part, names)
        inside = {} if layout else {prefix: _layout_of(part, group) for prefix, group in wrapped.items()}
        found = [
            replace(one, prefix=prefix + one.prefix) for prefix, one in inside.items() if one is not None
        ]
        if len(found) > 1:
            raise CascadeError(
                f"The file holds {part} twice, under {printable(found[0].prefix)} and {printable(found[1].prefix)}; "
                "choose a file that holds the network once."
            )
        if layout or found:
            parts[part] = layout or found[0]
    return parts


def _layout_of(part: str, names: list[str]) -> Layout | None:
    return next((layout for layout in LAYOUTS[part] if layout.holds(part, names)), None)


def without_wrapped_modules(name: str) -> str:
    """A name without the parts that torch inserts."""
    for wrapper in _WRAPPED_MODULES:
        name = name.replace(wrapper, "")
    return name
