"""Measurements of a process with limited memory: pictures, Stage A's decoding, loading up to the first step."""

import logging
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cascade_nodes.cascade_core.engine import graphs
from cascade_nodes.nodes.conditioning import CascadeTextEncode
from cascade_nodes.nodes.hosts import headless, reporting
from cascade_nodes.nodes.latents import CascadeDecode, CascadeEmptyLatent
from cascade_nodes.nodes.sampling import CascadeDecoderSampler, CascadePriorSampler
from load import STATUS, _proc_value
from timing import GB, clean, synchronise

PROMPT, NEGATIVE = "a large red star to the left of a small blue ring on a sand background", "blurry"
GUIDANCE = {"cfg_rescale": 0.7, "sampler": "ddpm", "denoise": 1.0}


class KeptMessages:
    """Progress sink that stores the host's messages: out of memory, and how it goes on."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def step(self, step: int, total: int, preview: Any) -> None:
        pass

    def notify(self, text: str) -> None:
        self.messages.append(text)

    def interrupted(self) -> bool:
        return False


class Cascade:
    """Cascade of all four networks, loaded as the nodes load them.  dtype: of Stage C and B"""

    def __init__(self, folder: Path, side: int, steps: tuple[int, int], dtype: str = "auto"):
        self.side, self.steps = side, steps
        self.stage_c = headless.load_network("stage_c", folder / "stage_c.safetensors", dtype)
        self.stage_b = headless.load_network("stage_b", folder / "stage_b.safetensors", dtype)
        self.stage_a = headless.load_stage_a(folder / "stage_a.safetensors")
        self.clip = headless.load_text_encoder(folder / "text.safetensors")

    @torch.inference_mode()
    def picture(self, seed: int) -> torch.Tensor:
        """(1, H, W, 3)"""
        positive, negative = CascadeTextEncode.execute(self.clip, PROMPT, NEGATIVE).args
        latent_c, latent_b = CascadeEmptyLatent.execute(self.side, self.side, 1, 42.67).args
        prior = {"steps": self.steps[0], "cfg": 4.0, "shift": 2.0, **GUIDANCE}
        latent_c = CascadePriorSampler.execute(
            self.stage_c, positive, negative, latent_c, seed=seed, **prior
        )[0]
        decoder = {"steps": self.steps[1], "cfg": 1.1, "shift": 1.0, **GUIDANCE}
        latent_b = CascadeDecoderSampler.execute(
            self.stage_b, positive, negative, latent_c, latent_b, seed=seed, **decoder
        )[0]
        return CascadeDecode.execute(self.stage_a, latent_b, 0)[0]

    def networks(self) -> dict[str, Any]:
        networks = {"text": self.clip.encoder.model, "stage_c": self.stage_c.network}
        return networks | {"stage_b": self.stage_b.network, "stage_a": self.stage_a.decoder}

    def staying(self) -> dict[str, float]:
        """Share of each network that is on the device now."""
        pool, networks = self.stage_c.device.pool, self.networks()
        return (
            {} if pool is None else {kind: pool.resident_share(network) for kind, network in networks.items()}
        )


class Counts(logging.Handler):
    """What each network's runs take, counted from outside: seconds, graphs captured, bytes copied, warnings."""

    def __init__(self, cascade: Cascade):
        super().__init__(logging.WARNING)
        self.warnings: list[str] = []
        self.kinds = {id(network): kind for kind, network in cascade.networks().items()}
        self.runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.captures: list[str] = []
        self.copied = 0
        self.pool: Any = cascade.stage_c.device.pool
        logging.getLogger().addHandler(self)
        if not hasattr(self.pool, "shared"):  # on a processor nothing is placed
            return
        captured, copy, run = graphs.CapturedForward, self.pool.device.copy, self.pool.run

        def counted_capture(forward: Any, x: torch.Tensor, *others: Any) -> Any:
            self.captures.append("x".join(map(str, x.shape)))
            return captured(forward, x, *others)

        def counted_copy(target: torch.Tensor, *others: Any) -> Any:
            self.copied += target.nbytes
            return copy(target, *others)

        def timed_run(network: Any, *given: Any, **named: Any) -> Any:
            self.captures, self.copied, start = [], 0, time.perf_counter()
            known = named.get("known_bytes") or (given[6] if len(given) > 6 else None)
            try:
                return run(network, *given, **named)
            finally:  # runs end with their result in main memory
                self.runs[self.kinds.get(id(network), "other")].append(
                    {
                        "seconds": round(time.perf_counter() - start, 4),
                        "captured": self.captures,
                        "copied_mb": self.copied // 10**6,
                        "known_mb": None if known is None else [each // 10**6 for each in known],
                        "workspaces_mb": [piece.nbytes // 10**6 for piece in self.pool.shared.pieces()],
                        "budget_mb": self.pool._device_budget() // 10**6,
                    }
                )

        graphs.CapturedForward = counted_capture  # type: ignore[assignment, misc]
        self.pool.device.copy, self.pool.run = counted_copy, timed_run

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())


def measure_pictures(
    folder: Path,
    device: torch.device,
    size: tuple[int, tuple[int, int]],
    runs: int,
    decoded: Sequence[int],
    dtype: str = "auto",
) -> dict[str, Any]:
    """Seconds and memory of pictures of `size` (pixels a side, steps) after two untimed ones, and of decoding."""
    messages = KeptMessages()
    with reporting.reporting_to(messages):
        start = time.perf_counter()
        cascade = Cascade(folder, *size, dtype)
        counts = Counts(cascade)
        cascade.picture(0)
        synchronise(device)
        first = time.perf_counter() - start
        cascade.picture(0)  # weights that come a second time are pinned in main memory
        clean(device)
        seconds = []
        for seed in range(1, runs + 1):
            start = time.perf_counter()
            cascade.picture(seed)
            synchronise(device)
            seconds.append(time.perf_counter() - start)
        cuda = device.type == "cuda"
        result = {
            "first": first,
            "seconds": statistics.median(seconds),
            "peak_gb": torch.cuda.max_memory_allocated(device) / GB if cuda else 0.0,
            "reserved_gb": torch.cuda.max_memory_reserved(device) / GB if cuda else 0.0,
            "staying": cascade.staying(),
            "runs": dict(counts.runs),  # of all pictures, the untimed ones too
            "warnings": counts.warnings,
        }
        decode = [measure_decoding(cascade, device, side) for side in decoded]
    return {**result, "decode": decode, "told": messages.messages}


def measure_decoding(cascade: Cascade, device: torch.device, side: int) -> dict[str, float]:
    """Seconds and peak memory of decoding a picture of `side` pixels, beside all resident weights."""
    latent = torch.randn(1, 4, side // 4, side // 4)
    cascade.stage_a.engine.forget()  # a recorded graph has its memory already
    CascadeDecode.execute(cascade.stage_a, {"samples": latent[..., :8, :8]}, 0)  # loads the weights
    clean(device)
    cuda = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    start = time.perf_counter()
    CascadeDecode.execute(cascade.stage_a, {"samples": latent}, 0)
    synchronise(device)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated(device) if cuda else 0
    return {"side": side, "seconds": seconds, "peak_gb": (peak - before) / GB}


def measure_loading(folder: Path, device: torch.device) -> dict[str, float]:
    """Seconds from Stage C's file to its first step done, and the main memory that this adds to the process."""
    torch.zeros(1, device=device)
    synchronise(device)
    before = _proc_value(STATUS, "VmRSS") * 1024
    start = time.perf_counter()
    with torch.inference_mode():
        model = headless.load_network("stage_c", folder / "stage_c.safetensors", "auto")
        config = model.network.config
        loaded = time.perf_counter() - start
        states = torch.randn(1, 77, config.c_clip_text)
        prompt = [[states, {"pooled_output": torch.randn(1, config.c_clip_text_pooled)}]]
        latent = CascadeEmptyLatent.execute(1024, 1024, 1, 42.67).args[0]
        once = {"steps": 1, "cfg": 4.0, "shift": 2.0, **GUIDANCE}
        CascadePriorSampler.execute(model, prompt, prompt, latent, seed=0, **once)
        synchronise(device)
    return {
        "returned": loaded,
        "first_step": time.perf_counter() - start,
        "host": _proc_value(STATUS, "VmHWM") * 1024 - before,
    }
