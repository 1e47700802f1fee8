"""Regenerates the demo's figures and pictures from its weights: `python -m cascade_nodes.demo.pages`.

Writes figures into `--work` (evaluate, tasks, high_resolution: minutes on a GPU, hours on two cores), and from them
the tables of demo/README.md and the contact sheet; then the example graphs' input pictures and, by ComfyUI and a
browser (docs/testing.md), their thumbnails and screenshots. --only makes a part; tables are filled from existing
figures. Look at every picture before it is committed: each task's sheet is in `--work` too.
"""

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade_nodes.cascade_core.errors import CascadeError
from cascade_nodes.cascade_core.writing import write_file
from cascade_nodes.demo import example_pictures, figures
from cascade_nodes.demo.pipeline import WEIGHTS
from cascade_nodes.demo.shares import Share, lowest

ROOT = Path(__file__).parents[1]
README, SHEET = ROOT / "demo" / "README.md", ROOT / "docs" / "images" / "contact_sheet.jpg"
SCREENSHOTS = "cascade_nodes.tests.comfyui.browser.screenshots"

# Tables of the README between <!-- figures NAME --> and <!-- end -->; a row is written if all its figures exist.
# ruff: noqa: E501 (a row is a line)
TABLES: dict[str, Sequence[tuple[str, str]]] = {
    "evaluate": (
        ("objects in the right colour", "{objects_colour:.1%}"),
        ("objects of the right shape", "{objects_shape:.1%}"),
        ("objects of the right size", "{objects_size:.1%}"),
        ("relations right", "{relations:.1%}"),
        ("backgrounds right", "{backgrounds:.1%}"),
        ("number of objects right", "{counts:.1%}"),
        ("pictures right in everything", "{all_right:.1%}"),
        ("the same with Stage C's guidance at 1, {half} prompts", "{all_right_at_guidance_1:.1%}"),
        (
            "reconstruction of 200 held-out scenes (compressor, Stage B, Stage A)",
            "{reconstruction_psnr_db:.1f} dB PSNR",
        ),
        ("red objects for {half} prompts of one object without a colour", "{red_objects}"),
        ('the same with the negative prompt "red"', "{red_objects_with_negative_red}"),
        ("rendered held-out scenes (2,000) that the judge reads fully right", "{judge_on_renders:.1%}"),
        ("shapes of the 64 pairs of shape and colour, half of them small", "{pairs_shapes}"),
        ("objects of these pairs right in shape, colour and size: all; small ones; held-out pairs", "{pairs_right}; {pairs_right_small}; {pairs_right_held_out}"),
        ("the pairs that are right least often", "{pairs_by_pair_lowest}"),
        ("the same by size", "{pairs_by_size_lowest}"),
        ("the same by colour, the lowest", "{pairs_by_colour_lowest}"),
        ("read back right from the renderer's own latents; small held-out ones", "{renderer_right}; {renderer_right_small_held_out}"),
        ("three objects right in everything", "{three_all_right}"),
        ('what a prompt excludes ("no red") is missing; the same in pictures whose prompt does not exclude it', "{negation_absences:.1%}; {negation_absences_unsaid:.1%}"),
        ("prompts with signs right in everything", "{punctuation_all_right}"),
        ("3:2, 16:9, 9:16 in one pass right in everything", "{proportions_3:2}; {proportions_16:9}; {proportions_9:16}"),
        ("shapes that a small network reads from the image encoder's embeddings, of scenes with one, two, three objects", "{embeddings_shapes_told_of_1}; {embeddings_shapes_told_of_2}; {embeddings_shapes_told_of_3}"),
        ("the second judge agrees, on pictures and on renders", "{judges_agreement_on_pictures}; {judges_agreement_on_renders}"),
    ),
    "tasks": (
        ("canny ControlNet: overlap of edges with the hint (intersection over union), with and without it", "{controlnet_canny_edge_iou:.2f}, {controlnet_canny_edge_iou_without:.2f}"),
        ("canny ControlNet at half strength: the same overlap", "{controlnet_canny_edge_iou_at_half_strength:.2f}"),
        ("inpainting: the new object as the prompt says, with the ControlNet, with the mask alone", "{inpaint_inside_right:.1%}, {inpaint_inside_right_without_controlnet:.1%}"),
        ("the same, outside the mask before compositing (after it: bit for bit)", "{inpaint_outside_psnr_db_before_compositing:.1f} dB"),
        ("outpainting half a picture: the new object right", "{outpaint_new_object_right:.1%}"),
        ("image to image: likeness to the source at `denoise` 0.2, 0.5, 0.8; another background taken at 0.8", "{image_to_image_psnr_at_0.2_db:.1f}, {image_to_image_psnr_at_0.5_db:.1f}, {image_to_image_psnr_at_0.8_db:.1f} dB; {image_to_image_change_of_background_taken_at_0.8:.1%}"),
        ("image variation: same shapes and colours, of new pictures; of pictures of what was never trained", "{variation_right:.1%}, {variation_right_of_what_was_never_trained:.1%}"),
        ("two pictures as one prompt: both objects right; of what was never trained", "{mixing_both_right:.1%}; {mixing_both_right_of_what_was_never_trained:.1%}"),
        ("LoRA that teaches a ninth shape, a house: that object right, with it, without it", "{lora_houses_right:.1%}, {lora_houses_right_without:.1%}"),
        ("the same LoRA: the whole caption right; ordinary held-out prompts right with it", "{lora_right_in_everything:.1%}, {lora_ordinary_prompts_right_with_it:.1%}"),
        ("a name that was learned for the green ring: that object right, by the name, in words", "{token_object_right:.1%}, {token_object_right_in_words:.1%}"),
        ("few steps: right in everything at 20 steps, at 4 and 2 of `lcm` with the distilled LoRA, at 4 without", "{few_steps_right_at_20_steps:.1%}, {few_steps_right_at_4_steps:.1%}, {few_steps_right_at_2_steps:.1%}, {few_steps_right_at_4_steps_without_lora:.1%}"),
        ("super resolution, 16 to 256 pixels: PSNR of the whole picture against bicubic; at the outlines", "{super_resolution_psnr_db:.1f}, {super_resolution_psnr_db_bicubic:.1f} dB; {super_resolution_outlines_psnr_db:.1f}, {super_resolution_outlines_psnr_db_bicubic:.1f} dB"),
        ("high resolution: right in everything at 256×256, in two passes at 512×512", "{high_2_all_right_at_1x:.1%}, {high_2_all_right_at_2x:.1%}"),
        ("the same at 256×256, in two passes at 1024×1024", "{high_4_all_right_at_1x:.1%}, {high_4_all_right_at_4x:.1%}"),
    ),
}  # fmt: skip


class Row(dict[str, Any]):
    """Figures by name, for a template with names that hold dots and colons; `{name}` or `{name:.1%}`."""

    def fill(self, template: str) -> str | None:
        """The template with its figures; None where a figure is missing."""
        names = re.findall(r"{(.+?)}", template)
        texts = [self._text(name) for name in names]
        if None in texts:
            return None
        parts = iter(texts)
        return re.sub(r"{.+?}", lambda _: str(next(parts)), template).replace("%", " %")

    def _text(self, name: str) -> str | None:
        if name in self:
            value = self[name]
            if isinstance(value, Share):
                return f"{value.share:.1%} ({value.low:.1%} to {value.high:.1%})"
            return str(value)
        name, _, spec = name.rpartition(":")
        return format(self[name], spec) if name in self else None


def figures_of(contents: Mapping[str, Any], before: str = "") -> Row:
    """A file's figures by name, prefixed with the task; shares with intervals, groups as their lowest in words."""
    row = Row()
    for name, value in contents.items():
        if isinstance(value, list):
            row[before + name] = Share(*value)
        elif name == "by" or name.endswith("_by"):
            for kind, groups in value.items():
                row[f"{before}{name}_{kind}_lowest"] = lowest({k: Share(*s) for k, s in groups.items()})
        elif isinstance(value, dict):
            row |= figures_of(value, f"{before}{name}_")
        else:
            row[before + name] = value
    return Row(row)


def table(name: str, row: Row) -> str:
    """The rows of a table as Markdown, with the machine and date of the measurement."""
    filled = [(row.fill(label), row.fill(template)) for label, template in TABLES[name]]
    lines = [f"| {label} | {figure} |" for label, figure in filled if label and figure]
    measured = f"{row['count']} prompts, {row['machine']}, {row['date']}."
    return "\n".join(["| what | figure |", "|---|---|", *lines, "", measured])


def fill_tables(text: str, rows: Mapping[str, Row]) -> str:
    """A page with its tables filled anew. Raises CascadeError where a table has no place in it."""
    for name, row in rows.items():
        pattern = rf"(<!-- figures {name} -->\n\n).*?(\n\n<!-- end -->)"
        made = table(name, row)
        text, count = re.subn(pattern, lambda m, made=made: m[1] + made + m[2], text, flags=re.S)
        if count != 1:
            raise CascadeError(
                f"The page has {count} places for the table {name}; it must have one, between <!-- figures {name} --> "
                "and <!-- end -->."
            )
    return text


def make_figures(options: argparse.Namespace) -> None:
    figures.measure(options, [gpu for gpu in options.gpus.split(",") if gpu])
    write_file(SHEET, (options.work / "sheets" / "adherence.jpg").read_bytes())


def make_tables(options: argparse.Namespace) -> None:
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in options.work.glob("*.json")}
    rows = {name: figures_of(files[name]) for name in TABLES if name in files}
    for scale in figures.LARGER:
        if "tasks" in rows and f"high_{scale}" in files:
            rows["tasks"] |= figures_of(files[f"high_{scale}"], f"high_{scale}_")
    if "evaluate" in rows:
        rows["evaluate"]["half"] = rows["evaluate"]["count"] // 2
    write_file(README, fill_tables(README.read_text("utf-8"), {name: Row(row) for name, row in rows.items()}))


def make_inputs(_: argparse.Namespace) -> None:
    example_pictures.main([])


def make_screenshots(_: argparse.Namespace) -> None:
    subprocess.run([sys.executable, "-m", SCREENSHOTS], check=True)


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "figures": make_figures,
    "tables": make_tables,
    "inputs": make_inputs,
    "screenshots": make_screenshots,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--gpus", default="", help="numbers of the GPUs, by commas (default: processors)")
    parser.add_argument("--count", type=int, default=500, help="held-out prompts (default: 500)")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/figures"), help="figures and sheets (runs/figures)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=tuple(PARTS), help="only these parts")
    options = parser.parse_args(arguments)
    for name in options.only:
        PARTS[name](options)


if __name__ == "__main__":
    main()
