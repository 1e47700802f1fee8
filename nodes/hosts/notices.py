"""A sampler's notices about its run: in English for every client, and by key for the panel in the user's language."""

from __future__ import annotations

from typing import Any

SENTENCES = {
    "guidance": "The MODEL's own guidance is used ({node}); cfg_rescale {value} of this node is not.",
    "schedule": "The MODEL's own schedule is used ({node}, shift {shift}); shift {value} of this node is not.",
    "foreign": (
        "{node} put a schedule on the MODEL that is not Stable Cascade's, which its networks were not trained on: "
        "shift {value} of this node is used instead."
    ),
    "blocks": "{node} patches {blocks}, which {network} does not have: it changes nothing in the network.",
    "wrapped": (
        "{node} wraps the network, which ComfyUI's own {network} does not allow: it changes nothing in the network; "
        "use Load {network}."
    ),
    "tiles": "{node} is called for each tile by itself, as if each were a step: with a cache, set tile_size to 0.",
    "network": "{key} was put on the MODEL for other networks: it changes nothing in {network}.",
    "sampler": "{key} was put on the MODEL for other samplers: it changes nothing in this one.",
    "unchanged": "{node} left the MODEL as it was: it may be for blocks that {network} does not have.",
    "attention": (
        "{node} replaced the MODEL's attention, which only plain PyTorch can do: this run does without the "
        "engine."
    ),
    "layer": (
        "Another node replaced {layer} of the network, which only plain PyTorch can do: this run does "
        "without the engine."
    ),
    "memory": (
        "The card ran out of memory; the run was begun again with the other models off the card. If this "
        "happens each time, a smaller batch or size is faster."
    ),
}


class Notice(str):
    """One of SENTENCES with its values in place."""

    key: str
    values: dict[str, str]

    def __new__(cls, key: str, /, **values: str) -> Notice:
        notice = super().__new__(cls, SENTENCES[key].format(**values))
        notice.key, notice.values = key, values
        return notice

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, str]]:
        """The arguments for making copies."""
        return (self.key,), self.values


def shown(notices: Any) -> dict[str, list[Any]]:
    """The `ui` data of a node that shows these notices; empty without any."""
    if not notices:
        return {}
    return {
        "text": [str(notice) for notice in notices],
        "cascade_notices": [[notice.key, notice.values] for notice in notices],
    }
