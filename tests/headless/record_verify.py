"""Records what diffusers gives for the demo's networks, fixed inputs and one small picture, for `test_verify.py`.

    python -m cascade_nodes.tests.headless.record_verify

in an environment with diffusers; `verify_diffusers.json` beside this file was written with 0.35.2.
"""

import json
import sys
import tempfile
from pathlib import Path

from cascade_nodes.headless.progress import TransferProgress
from cascade_nodes.headless.verify.check_picture import check_picture
from cascade_nodes.headless.verify.files import check_file, safetensors_in
from cascade_nodes.headless.verify.in_diffusers import load_diffusers
from cascade_nodes.headless.verify.picture import PictureRun
from cascade_nodes.headless.verify.report import Report
from cascade_nodes.nodes.hosts.roles import DEMO_FOLDER

RECORDED = Path(__file__).with_name("verify_diffusers.json")
RUN = PictureRun.small(size=(256, 256), steps=(4, 2))


def record() -> None:
    """Writes `RECORDED`."""
    library, progress = load_diffusers(), TransferProgress(results=sys.stderr)
    if library is None:
        raise SystemExit("diffusers is not installed here.")
    with tempfile.TemporaryDirectory() as folder:
        report = Report([DEMO_FOLDER], Path(folder))
        for path in safetensors_in(DEMO_FOLDER):
            progress.node_started(1, 1, path.name)
            check_file(report, path, library, progress)
        check_picture(report, RUN, "full", "fp32", "cpu", None, library, progress)
    assert not report.problems, report.problems
    outputs = {
        f"{file['file']} {name}": output["diffusers"]
        for file in report.data["files"]
        for network in file["networks"]
        for name, output in network["outputs"].items()
        if "diffusers" in output
    }
    recorded = {
        "diffusers": library.__version__,
        "outputs": outputs,
        "picture": {name: report.data["picture"]["diffusers"][name] for name in ("latent", "pixels")},
    }
    RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
