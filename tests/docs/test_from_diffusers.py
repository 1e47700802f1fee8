"""The code of docs/from-diffusers.md runs, on the demo: its blocks one after the other in one interpreter."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-diffusers.md"
DEMO = {
    '"models"': repr(str(ROOT / "demo" / "weights")) + ", size=(256, 256)",
    "my_style.safetensors": "demo_lora_house.safetensors",
    "1024": "256",
}
WHAT_CAME_OF_IT = """
from cascade_nodes.cascade_core.pictures import as_image
from cascade_nodes.demo.judge import read


def objects(picture):
    return [(o.colour, o.shape) for o in read(as_image(picture).movedim(-1, 1))[0].objects]


assert tensor.shape == (1, 3, 256, 256) and image.size == (256, 256) and array.shape == (1, 256, 256, 3)
assert latents.shape == latent.shape == (1, 16, 6, 6) and prompt_embeds.shape[1] == 77
assert len(one_each) == 2 and len(two_each) == 4 and all(objects(picture) for picture in [*one_each, *two_each])
assert objects(pictures[0]) == objects(image) == [("red", "star")]
assert as_image(pictures[0]).sub(images).abs().max() < 1 / 254
assert [step.index for step in seen] == list(range(len(times) - 1))
assert len(variations) == 2 and variations[0].tobytes() != pictures[0].tobytes() != mixed[0].tobytes()
assert not torch.equal(changed, embeddings)
assert image_embeds.shape[0] == 1 and latent_of_both.shape == latent.shape
assert not torch.equal(latent_of_both, changed)
assert not torch.equal(styled, embeddings)
assert torch.equal(cascade.prior(prompt, size=(256, 256), seed=7), embeddings)
"""


def test_its_code_runs_on_the_demo(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    code = "\n".join(block for block in blocks if not block.startswith("# diffusers"))
    for published, demo in DEMO.items():
        assert published in code
        code = code.replace(published, demo)
    run = subprocess.run(
        [sys.executable, "-c", code + WHAT_CAME_OF_IT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("stage_c: step 1 of 20\n")
