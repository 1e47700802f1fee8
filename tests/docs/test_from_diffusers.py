"""The code of docs/from-diffusers.md runs, on the demo: its blocks one after the other in one interpreter."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-diffusers.md"
DEMO = {
    "stage_c_bf16.safetensors": "demo_stage_c.safetensors",
    "stage_b_bf16.safetensors": "demo_stage_b.safetensors",
    "stage_a.safetensors": "demo_stage_a.safetensors",
    "stable_cascade_text_encoder.safetensors": "demo_text_encoder",
    "clip_vit_large_patch14.safetensors": "demo_image_encoder.safetensors",
    "my_style.safetensors": "demo_lora_house.safetensors",
    "example_workflows/api/text_to_image_published.json": str(
        ROOT / "example_workflows" / "api" / "text_to_image.json"
    ),
    "1024": "256",
}
WHAT_CAME_OF_IT = """
from cascade_nodes.demo.judge import read

assert tensor.shape == (1, 3, 256, 256) and image.size == (256, 256) and array.shape == (256, 256, 3)
assert latents.shape == latent.shape == (1, 16, 6, 6) and prompt_embeds.shape[1] == 77
assert [[len(read(one.movedim(-1, 0)[None])[0].objects) > 0 for one in batch] for batch in both] == [[True] * 2] * 2
(found,) = read(tensor)[0].objects
assert (found.colour, found.shape) == ("red", "star")
assert [step.index for step in seen] == list(range(len(times) - 1))
assert not torch.equal(variations["samples"], embeddings["samples"])
assert Image.open(path).size == (256, 256)
own = CascadePriorSampler.execute(changed, positive, negative, latent_c, seed=7, **PRIOR)[0]
assert not torch.equal(own["samples"], CascadePriorSampler.execute(
    stage_c, positive, negative, latent_c, seed=7, **PRIOR)[0]["samples"])
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
    assert run.stdout.startswith("step 1 of 20\n")
