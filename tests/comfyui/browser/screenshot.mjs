/** Draws a graph as the interface shows it: settings on standard input, a PNG of the graph alone in a file. */

import { readFileSync } from "node:fs";
import { withPage } from "./page.mjs";

const MARGIN = 24;

const settings = JSON.parse(readFileSync(0, "utf8"));

await withPage(settings, async (page) => {
  await page.evaluate(([graph, name]) => window.app.loadGraphData(graph, true, true, name), [settings.graph, "example"]);
  await page.waitForTimeout(1000);
  await page.keyboard.press("Escape");
  if (settings.run) {
    await page.getByRole("button", { name: "Run", exact: true }).first().click();
    await page.waitForFunction(
      (id) => {
        const node = window.app.graph.getNodeById(id);
        return (document.querySelector(`[data-node-id="${id}"] img`) ?? node.imgs?.[0])?.naturalWidth;
      },
      settings.run,
      { timeout: 300_000 },
    );
  }
  const area = await page.evaluate((margin) => {
    const { canvas, graph } = window.app;
    const boxes = graph._groups.map((group) => group._bounding);
    const left = Math.min(...boxes.map((box) => box[0])) - margin;
    const top = Math.min(...boxes.map((box) => box[1])) - margin;
    const right = Math.max(...boxes.map((box) => box[0] + box[2])) + margin;
    const bottom = Math.max(...boxes.map((box) => box[1] + box[3])) + margin;
    canvas.ds.scale = 1;
    canvas.ds.offset = [-left, -top];
    canvas.setDirty(true, true);
    return { width: right - left, height: bottom - top };
  }, MARGIN);
  // Menus and notices lie over the graph: only its canvas and the widgets in it are shown.
  await page.setViewportSize({ width: Math.ceil(area.width), height: Math.ceil(area.height) });
  await page.addStyleTag({
    content: `body * { visibility: hidden !important; }
      canvas#graph-canvas, .dom-widget, .dom-widget * { visibility: visible !important; }`,
  });
  await page.evaluate(() => {
    window.app.canvas.show_info = false;
    for (const node of window.app.graph._nodes) node.has_errors = false; // files that are not on this machine
    window.app.canvas.setDirty(true, true);
  });
  await page.waitForTimeout(1500);
  await page.screenshot({ path: settings.picture });
});
