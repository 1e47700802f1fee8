"""Measures what the image encoder tells of its pictures: the most that Stage C can keep in a variation."""

import torch
from torch import Tensor

from cascade_nodes.demo.dataset import pictures
from cascade_nodes.demo.layout import NAMELESS, NOTHING, CellReader, Cells, cells_loss, cells_of
from cascade_nodes.demo.measuring import SEED
from cascade_nodes.demo.pipeline import DemoCascade, Sampling
from cascade_nodes.demo.shares import Groups, Share, share
from cascade_nodes.demo.wide_scenes import sample_wide
from cascade_nodes.demo.world import pack

LEARNED, READ = 10, 2  # scenes for each one of the count: to learn reading from, and to measure it on
OBJECTS = (0.4, 0.4, 0.2)  # shares of scenes with one, two and three objects
STEPS, BATCH = 1500, 256
AT_ONCE = 250  # pictures


def embeddings(
    cascade: DemoCascade, count: int, prior: Sampling, decoder: Sampling
) -> tuple[dict[str, float | Share | Groups], Tensor]:
    """Shares of the shapes that a small network reads from embeddings of new scenes, by their number of objects.

    The network is told in which cell an object stands, not which shape it has.
    """
    table = sample_wide((LEARNED + READ) * count, SEED + 12, objects=OBJECTS)
    embedded, some = [], torch.empty(0)
    for start in range(0, len(table.kind), AT_ONCE):
        images = pictures(table.rows(slice(start, start + AT_ONCE)), cascade.device)
        embedded.append(cascade.embed(images).float().clone())  # usable outside inference mode
        some = images if start == 0 else some
    values = torch.cat(embedded)
    values = (values - values.mean(0)) / values.std()
    cells = Cells(*(column.to(values.device) for column in cells_of(pack(table))))
    learned = LEARNED * count
    reader = _trained_reader(values[:learned], Cells(*(column[:learned] for column in cells)))
    with torch.no_grad():
        found = reader(values[learned:])[0][:, :NAMELESS].argmax(1)
    shape = cells.shape[learned:]
    there = shape != NOTHING
    objects = there.sum((1, 2))
    figures: dict[str, float | Share | Groups] = {}
    for number in range(1, len(OBJECTS) + 1):
        counted = there & (objects == number)[:, None, None]
        figures[f"shapes_told_of_{number}"] = share((found == shape)[counted].tolist())
    return figures, some[:24].cpu()


def _trained_reader(values: Tensor, cells: Cells) -> CellReader:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        reader = CellReader(values.shape[1]).to(values.device)
        batches = torch.randint(len(values), (STEPS, BATCH)).to(values.device)
    optimiser = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, STEPS)
    for rows in batches:
        loss = cells_loss(reader(values[rows]), Cells(*(column[rows] for column in cells)))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return reader
