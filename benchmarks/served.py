"""Speed of pictures from a real ComfyUI server, as its users have it: its own nodes beside this pack's.

    python benchmarks/served.py CHECKOUT [--rows ours,native] [--memory all,12,8] [--flags=--lowvram] [--json FILE]

Published sizes with random weights, 1024 × 1024, 20 + 10 steps, guidance in both stages, as the server decides without
flags. Each row is a server of its own. Seconds are the server's, from the start of a queued graph to its end:

seed, prompt  until the picture is in main memory, for a new seed, and for a new prompt too
png           what a preview adds to that
first         the first picture of the server, which loads the files

Memory (GB) is taken away by another process, and the server is told that its card has no more than what is left.

CHECKOUT is a folder of ComfyUI; its packages are those of the Python that runs this, or of CHECKOUT/.venv.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.writing import write_file
from machine import describe_machine, print_table
from memory import BIG_G
from random_files import write_network

PACK = Path(__file__).resolve().parents[1]
GRAPH = PACK / "example_workflows" / "api" / "text_to_image_published.json"
PROMPTS = (
    "a lighthouse on a rocky coast",
    "a red fox in the snow",
    "an old harbour at dawn",
    "a bowl of cherries",
)
FILES = {
    "stage_c": "diffusion_models/stage_c_bf16.safetensors",
    "stage_b": "diffusion_models/stage_b_bf16.safetensors",
    "stage_a": "vae/stage_a.safetensors",
    "text": "text_encoders/stable_cascade_text_encoder.safetensors",
}
RUNS = 5
PATIENCE = 600  # seconds until a server has started, or a graph is done

# In the server's process: the card has no more memory than CARD_GB.
SMALLER_CARD = """
import os, torch
_limit, _real = float(os.environ["CARD_GB"]) * 2**30, torch.cuda.mem_get_info
def _mem_get_info(*arguments, **options):
    return int(min(_real(*arguments, **options)[0], _limit)), int(_limit)
torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = _mem_get_info
"""
BALLAST = """
import sys, torch
free, _ = torch.cuda.mem_get_info()
held = torch.empty(int(free - {left} * 2**30), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""

Graph = dict[str, Any]


def node(kind: str, **inputs: Any) -> Graph:
    return {"class_type": kind, "inputs": inputs}


def native(seed: int, text: str) -> Graph:
    """ComfyUI's own nodes, loaders to decoder."""
    sampling = {"sampler_name": "euler_ancestral", "scheduler": "simple", "denoise": 1.0, "seed": seed}
    return {
        "1": node("UNETLoader", unet_name=Path(FILES["stage_c"]).name, weight_dtype="default"),
        "2": node("UNETLoader", unet_name=Path(FILES["stage_b"]).name, weight_dtype="default"),
        "3": node("VAELoader", vae_name=Path(FILES["stage_a"]).name),
        "4": node("CLIPLoader", clip_name=Path(FILES["text"]).name, type="stable_cascade"),
        "5": node("CLIPTextEncode", clip=["4", 0], text=text),
        "6": node("CLIPTextEncode", clip=["4", 0], text="blurry, text, watermark"),
        "7": node("StableCascade_EmptyLatentImage", width=1024, height=1024, compression=42, batch_size=1),
        "8": node(
            "KSampler", model=["1", 0], positive=["5", 0], negative=["6", 0], latent_image=["7", 0], steps=20, cfg=4.0,
            **sampling,
        ),
        "9": node("StableCascade_StageB_Conditioning", conditioning=["5", 0], stage_c=["8", 0]),
        "10": node("ConditioningZeroOut", conditioning=["5", 0]),
        "11": node(
            "KSampler", model=["2", 0], positive=["9", 0], negative=["10", 0], latent_image=["7", 1], steps=10, cfg=1.1,
            **sampling,
        ),
        "picture": node("VAEDecode", vae=["3", 0], samples=["11", 0]),
    }  # fmt: skip


def mixed(seed: int, text: str) -> Graph:
    """ComfyUI's nodes on this pack's MODELs and VAE."""
    graph = native(seed, text)
    for number, kind in (("1", "stage_c"), ("2", "stage_b")):
        loader = {"stage_c": "StageCLoader", "stage_b": "StageBLoader"}[kind]
        graph[number] = node(loader, file=Path(FILES[kind]).name, dtype="auto")
    graph["3"] = node("StageAVAE", file=Path(FILES["stage_a"]).name)
    return graph


def ours(seed: int, text: str) -> Graph:
    """The shipped example for the published files."""
    graph = json.loads(GRAPH.read_text(encoding="utf-8"))
    graph["5"]["inputs"]["positive"] = text
    for number in ("7", "8"):
        graph[number]["inputs"]["seed"] = seed
    (picture,) = (number for number, each in graph.items() if each["class_type"] == "CascadeDecode")
    graph["picture"] = graph.pop(picture)
    return {number: each for number, each in graph.items() if each["class_type"] != "SaveImage"}


ROWS: dict[str, Callable[[int, str], Graph]] = {"ours": ours, "mixed": mixed, "native": native}


def in_main_memory(graph: Graph) -> Graph:
    """Ends with 64 × 64 pixels of the picture, whose PNG takes no time."""
    crop = node("ImageCrop", image=["picture", 0], width=64, height=64, x=0, y=0)
    return {**graph, "crop": crop, "end": node("PreviewImage", images=["crop", 0])}


def with_png(graph: Graph) -> Graph:
    return {**graph, "end": node("PreviewImage", images=["picture", 0])}


class Server:
    """A ComfyUI with the random files, this pack alone, and the flags."""

    def __init__(self, checkout: Path, base: Path, flags: list[str], memory: float | None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.log = base / "log.txt"
        environment = dict(os.environ)
        if memory is not None:
            environment["CARD_GB"] = str(memory)
        python = checkout / ".venv" / "bin" / "python"
        command = [str(python if python.exists() else sys.executable), "-c", self._program(memory), "--port"]
        command += [
            self.url.rsplit(":", 1)[1],
            "--base-directory",
            str(base),
            "--front-end-root",
            str(base / "front"),
        ]
        command += ["--disable-auto-launch", "--disable-api-nodes", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=checkout, env=environment, stdout=log, stderr=log)

    def _program(self, memory: float | None) -> str:
        run = "import runpy, sys; sys.argv[0] = 'main.py'; sys.path.insert(0, '.'); "
        run += "runpy.run_path('main.py', run_name='__main__')"
        # ComfyUI chooses its allocator before torch is imported: so the limit comes when torch does.
        return run if memory is None else f"import builtins\n{_AT_IMPORT.format(code=SMALLER_CARD)}\n{run}"

    def wait(self) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            try:
                self.get("/system_stats")
                return
            except OSError:
                time.sleep(0.2)
        raise SystemExit(f"ComfyUI did not start:\n{self.log.read_text()[-3000:]}")

    def get(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def seconds(self, graph: Graph) -> float:
        """From the start of the graph to its end, as the server tells."""
        number = self.get("/prompt", {"prompt": graph})["prompt_id"]
        end = time.monotonic() + PATIENCE
        while number not in (history := self.get(f"/history/{number}")):
            if time.monotonic() > end or self.process.poll() is not None:
                raise RuntimeError(f"The graph did not end:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.01)
        status = history[number]["status"]
        if status["status_str"] != "success":
            raise RuntimeError(f"The graph failed: {status['messages'][-1]}")
        times = {kind: message["timestamp"] for kind, message in status["messages"]}
        return (times["execution_success"] - times["execution_start"]) / 1000

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


_AT_IMPORT = """
_import = builtins.__import__
def _watched(name, *arguments, **options):
    module = _import(name, *arguments, **options)
    if name == "torch" and hasattr(module, "cuda") and hasattr(module.cuda, "mem_get_info"):
        builtins.__import__ = _import
        exec({code!r})
    return module
builtins.__import__ = _watched
"""


@contextmanager
def ballast(left: float | None) -> Iterator[None]:
    """Another process that holds the card's memory but for `left` GB."""
    if left is None:
        yield
        return
    program = [sys.executable, "-c", BALLAST.format(left=left)]
    process = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    if process.stdout.readline().strip() != "held":
        raise SystemExit("The card's memory could not be taken.")
    try:
        yield
    finally:
        process.stdin.close()
        process.wait(20)


def measure(server: Server, graph: Callable[[int, str], Graph], runs: int) -> dict[str, float]:
    """Seconds of the first picture, then medians after two to warm up."""
    result = {"first": server.seconds(in_main_memory(graph(1, PROMPTS[0])))}
    for seed in (2, 3):
        server.seconds(in_main_memory(graph(seed, PROMPTS[0])))
    seeds = iter(range(4, 1000))
    new_seed = [server.seconds(in_main_memory(graph(next(seeds), PROMPTS[0]))) for _ in range(runs)]
    new_prompt = [server.seconds(in_main_memory(graph(next(seeds), PROMPTS[i % 3 + 1]))) for i in range(runs)]
    png = [server.seconds(with_png(graph(next(seeds), PROMPTS[runs % 3 or 1]))) for _ in range(runs)]
    result["seed"], result["prompt"] = statistics.median(new_seed), statistics.median(new_prompt)
    result["png"] = statistics.median(png) - result["seed"]
    return result


def write_files(base: Path) -> None:
    """Random weights of the published sizes, which are the configurations' defaults, and this pack as the only one."""
    for kind, name in FILES.items():
        path = base / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            write_network(path, kind, BIG_G if kind == "text" else {})
    for folder in ("custom_nodes", "input", "output", "temp", "user", "front"):
        (base / folder).mkdir(exist_ok=True)
    (base / "front" / "index.html").write_text("<html></html>")
    pack = base / "custom_nodes" / "cascade-nodes"
    if not pack.is_symlink():
        pack.symlink_to(PACK)


def report(results: dict[str, Any]) -> None:
    rows = []
    for row in results["rows"]:
        memory = "all" if row["memory"] is None else f"{row['memory']:g} GB"
        columns = [f"{row[name]:.2f}" if name in row else "" for name in ("seed", "prompt", "png", "first")]
        rows.append([row["who"], memory, " ".join(row["flags"]), *columns, row.get("error", "")])
    print_table(["nodes", "memory", "flags", "new seed", "new prompt", "PNG", "first", ""], rows)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--rows", default="ours,mixed,native", help="by commas")
    parser.add_argument("--memory", default="all", help="GB by commas, or all")
    parser.add_argument("--flags", default="", help="of the server, by spaces")
    parser.add_argument("--runs", type=int, default=RUNS)
    parser.add_argument("--folder", type=Path, help="keep the random files here")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    version = (options.checkout / "comfyui_version.py").read_text(encoding="utf-8").split('"')[1]
    results: dict[str, Any] = {"machine": describe_machine(), "comfyui": version, "rows": []}
    if torch.cuda.is_available():
        results["device"] = torch.cuda.get_device_name()
    with ExitStack() as stack:
        base = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_files(base)
        for memory in (None if each == "all" else float(each) for each in options.memory.split(",")):
            for who in options.rows.split(","):
                row: dict[str, Any] = {"who": who, "memory": memory, "flags": options.flags.split()}
                results["rows"].append(row)
                with ballast(memory):
                    server = Server(options.checkout, base, row["flags"], memory)
                    try:
                        server.wait()
                        row |= measure(server, ROWS[who], options.runs)
                    except RuntimeError as error:
                        row["error"] = str(error)[:300]
                    finally:
                        server.stop()
                print(json.dumps(row), flush=True)
                if options.json:
                    write_file(options.json, json.dumps(results, indent=1) + "\n")
    report(results)
    return any("error" in row for row in results["rows"])


if __name__ == "__main__":
    sys.exit(main())
