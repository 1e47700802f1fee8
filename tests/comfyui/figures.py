"""Differences between our results and ComfyUI's own in every version found, as the table of docs/nodes.md.

    COMFYUI_PATH=… python -m cascade_nodes.tests.comfyui.figures

Each is the largest difference over the largest value of what is compared, on the CPU in float32.
"""

from __future__ import annotations

from cascade_nodes.tests.comfyui.checkout import CHECKOUTS

# What is compared, the script in inside/ that measures it, and what the names of its measurements have in common.
ROWS = (
    ("each network, from the same weights", "parity", ""),
    ("our samplers (Stage C and B): on our MODEL and on ComfyUI's", "interop", "on either"),
    ("our sampler with `ddim`, and KSampler with `ddim` and `simple`", "interop", "ddim against KSampler"),
    ("our sampler, and ComfyUI's with `CascadeGuidance` and `CascadeScheduler`", "interop", "Cascade"),
    ("loaders, text, samplers and decoder: all 32 combinations of ours and ComfyUI's", "interop", "matrix"),
    (
        "ControlNets, areas, ranges of steps: nodes of ours and ComfyUI's, in any order",
        "conditioning",
        "same",
    ),
    (
        "a LoRA of Stage C: by ComfyUI's node, and merged into the file",
        "patching",
        "LoRA against merged weights",
    ),
    ("all weights on the device, and only a part of them", "patching", "partly loaded"),
    ("VAEDecode, VAEDecodeTiled and VAEEncode: on our VAE and on ComfyUI's", "patching", ", native network"),
    ("networks of the published widths (1 B, 0.7 B, bigG), random weights in bf16", "published", ""),
)
NO_DIFFERENCE = "share"  # a measurement of something else


def main() -> None:
    """Measures and prints."""
    if not CHECKOUTS:
        raise SystemExit("There is no ComfyUI to measure: set COMFYUI_PATH, or see docs/testing.md.")
    scripts = list(dict.fromkeys(script for _, script, _ in ROWS))
    measured = [one.inside(*scripts, timeout=3600) for one in CHECKOUTS]
    print(f"| what | {' | '.join(one.version for one in CHECKOUTS)} |")
    print(f"|---|{'---|' * len(CHECKOUTS)}")
    for key, script, words in ROWS:
        worst = [_worst(results[script].numbers, words) for results in measured]
        cells = [f"{value:.1e}" if value else "0" for value in worst]
        print(f"| {key} | {' | '.join(cells)} |")


def _worst(results: dict[str, float], words: str) -> float:
    return max(value for name, value in results.items() if words in name and NO_DIFFERENCE not in name)


if __name__ == "__main__":
    main()
