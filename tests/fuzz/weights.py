"""Safetensors files as a header and bytes, to be mutated and written as they are, right or wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

from cascade_nodes.tests.fuzz.values import odd_number, odd_text, odd_value

DTYPES = (
    "F32",
    "BF16",
    "F16",
    "F8_E4M3",
    "F8_E5M2",
    "F64",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "F4",
    "C64",
    "float32",
    "",
    None,
)
EXTRA_NAMES = (
    "text_model.encoder.layers.99999999.x", "down_blocks.0.99999999.depthwise.weight", "zz", "zz.weight",
    "scaled_fp8", "alpha", "clip_g", "",
    "__metadata__", "weights.9999", "lora_unet_down_blocks_0_0_x.alpha", "bundle_emb.a.string_to_param.*",
    "embeddings.0", "projections.7.2.bias",
    "cond_stage_model.x", "model.diffusion_model.x", "vocab.weight_scale", "blocks." + "0." * 500 + "weight",
    "\x1b[31mx", "\ud800", "a\0b",
)  # fmt: skip
SIZES = (0, 1, 2, 3, 7, 64, 10**6, 2**31, 2**40, 2**63, 2**64, -1, 1.5, "3", None, True)


def read(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write(path: Path, header: Any, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def mutate(path: Path, random: Random) -> None:
    """Spoils a file in its bytes, its header, its tensors or the settings in its metadata."""
    if random.random() < 0.2:
        path.write_bytes(spoiled_bytes(path.read_bytes() or b"x", random))
        return
    try:
        header, body = read(path)
    except (ValueError, struct.error):  # spoiled before
        return
    if not isinstance(header, dict):
        return
    for _ in range(random.choice((1, 1, 2, 4))):
        header, body = random.choice(
            (metadata, config, config, config, tensor, tensor, tensor, names, extra, extra, values)
        )(header, body, random)
    if random.random() < 0.1:
        text = json.dumps(header)
        header = random.choice(
            (
                text[:-1],
                "[" * 100_000,
                text.replace(":", "::", 1),
                text + text,
                "[]",
                "{}",
                "null",
                '{"a": NaN}',
            )
        ).encode()
    write(
        path,
        header,
        body,
        random.choice((0, 7, 2**63, 2**64 - 1, 99_999_999)) if random.random() < 0.03 else None,
    )


def spoiled_bytes(raw: bytes, random: Random) -> bytes:
    place = random.randrange(len(raw))
    early = random.randrange(min(len(raw), 400))
    return random.choice(
        (
            raw[:place], raw[:early], raw[:-1], b"", raw + b"\0" * 100,
                raw[:early] + bytes([random.randrange(256)]) + raw[early + 1 :],
            raw[:place] + random.randbytes(50) + raw[place + 50 :], random.randbytes(200), b"PK\x03\x04" + raw,
                b"GGUF" + raw, b"\x80\x02}" + raw,
            b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1\noid", raw[::-1],
                raw[:8] + raw[:8] + raw[8:],
        )
    )  # fmt: skip


def entries(header: dict[str, Any]) -> list[str]:
    return [name for name, entry in header.items() if name != "__metadata__" and isinstance(entry, dict)]


def some(header: dict[str, Any], random: Random) -> str:
    """The name of some tensor."""
    return random.choice(entries(header) or ["none"])


def metadata(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    stated = header.get("__metadata__")
    if not isinstance(stated, dict):
        stated = header["__metadata__"] = {}
    keys = (
        *stated,
        "config",
        "kind",
        "train_tokens",
        "ss_network_module",
        "format",
        "modelspec.architecture",
        odd_text(random)[:1000],
    )
    stated[random.choice(keys)] = odd_text(random) if random.random() < 0.8 else odd_value(random)
    if random.random() < 0.3:
        header["__metadata__"] = random.choice(({}, None, [], "x", {"config": "{}"}, {"kind": "stage_b"}))
    if random.random() < 0.3:
        header.pop("__metadata__")
    return header, body


def config(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    """Changes the settings in the metadata: a value of another size, type or depth."""
    stated = header.get("__metadata__")
    if not isinstance(stated, dict) or "config" not in stated:
        return metadata(header, body, random)
    try:
        settings = json.loads(stated["config"])
        spoil(settings, random)
    except (ValueError, TypeError, RecursionError):
        settings = {}
    stated["config"] = json.dumps(settings)
    if random.random() < 0.1:
        stated["config"] = random.choice(
            ("{", "[" * 100_000, "null", "[]", '"x"', "1e999", stated["config"] * 2, '{"a":' * 5000)
        )
    return header, body


def spoil(settings: Any, random: Random) -> None:
    """Changes one value somewhere in a structure."""
    places = [
        (where, key)
        for where in containers(settings)
        for key in (where if isinstance(where, dict) else range(len(where)))
    ]
    if not places:
        return
    where, key = random.choice(places)
    odd = random.choice((odd_number, odd_number, odd_value))(random)
    if isinstance(odd, int) and odd.bit_length() > 4000:  # more digits than Python writes
        odd = 10**300
    if isinstance(where, dict) and random.random() < 0.2:
        where.pop(key)
    elif isinstance(where, list) and random.random() < 0.2:
        where.extend(where * random.choice((1, 3, 1000)))
    else:
        where[key] = (
            odd if not isinstance(where[key], list) or random.random() < 0.5 else [odd] * len(where[key])
        )


def containers(value: Any) -> list[Any]:
    """The lists and objects of a structure, itself included; not those within more than five others."""
    found, level = [], [value]
    for _ in range(6):
        level = [each for each in level if isinstance(each, list | dict)]
        found += level
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return found


def tensor(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    """Changes a tensor's dtype, shape or place in the file."""
    entry = header.get(some(header, random))
    if not isinstance(entry, dict):
        return header, body
    shape, offsets = entry.get("shape", []), entry.get("data_offsets", [0, 0])
    way = random.random()
    if way < 0.25:
        entry["dtype"] = random.choice(DTYPES)
    elif way < 0.4:
        sides = shape if isinstance(shape, list) else []
        entry["shape"] = random.choice(
            (sides[::-1], [*sides, 1], [1, *sides], sides[1:], [], [0], [0, *sides], None, "x", {})
        )
    elif way < 0.6 and shape and isinstance(shape, list):
        shape[random.randrange(len(shape))] = random.choice(SIZES)
    elif way < 0.75 and offsets:
        offsets[random.randrange(len(offsets))] = random.choice((*SIZES, len(body), len(body) + 8))
    else:  # whole, but of another shape: as many numbers as before
        count = 1
        for side in shape or []:
            count *= side if isinstance(side, int) else 1
        entry["shape"] = random.choice(
            ([count], [1, count], [count, 1], [count // 2, 2] if count % 2 == 0 else [count])
        )
    return header, body


def names(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    """Takes tensors away, or gives them other names."""
    name = some(header, random)
    entry = header.pop(name, None)
    way = random.random()
    if way < 0.4:
        header[
            random.choice(
                (
                    name.upper(),
                    name + ".weight",
                    "model." + name,
                    name.replace("0", "7"),
                    odd_text(random)[:2000],
                )
            )
        ] = entry
    elif way < 0.6:
        prefix = random.choice(
            (
                "model.diffusion_model.",
                "base_model.model.",
                "prior.",
                "lora_unet_",
                "x.",
                "clip_g.transformer.",
            )
        )
        header = {key if key == "__metadata__" else prefix + key: value for key, value in header.items()}
    return header, body


def extra(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    """Adds a tensor: empty, small, or one that scales another's."""
    name = random.choice(
        (
            *EXTRA_NAMES,
            *(
                some(header, random).rpartition(".")[0] + end
                for end in (".scale_weight", ".alpha", ".dora_scale", ".weight_scale")
            ),
        )
    )
    rows = random.choice((0, 1, 1, 16, 30_000))
    dtype, size = random.choice((("F32", 4), ("F8_E4M3", 1), ("BF16", 2), ("I64", 8), ("BOOL", 1)))
    shape = random.choice(([rows], [rows, 1], [1, rows], [] if rows == 1 else [rows], [rows, 1, 1, 1]))
    header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + rows * size]}
    return header, body + random.choice((bytes(1), b"\xff", b"8")) * (rows * size)


def values(header: Any, body: bytes, random: Random) -> tuple[Any, bytes]:
    """Puts NaN, infinity or large numbers where weights were."""
    entry = header.get(some(header, random))
    try:
        start, end = entry["data_offsets"]
        filler = random.choice(
            (
                b"\xff\xff\xff\xff",
                b"\x00\x00\x80\x7f",
                b"\x00\x00\x00\x00",
                b"\xff\xff\x7f\x7f",
                b"\x00\x7c\x00\x7c",
            )
        )
        middle = (filler * ((end - start) // 4 + 1))[: end - start]
        return header, body[:start] + middle + body[end:]
    except (TypeError, KeyError, ValueError):
        return header, body
