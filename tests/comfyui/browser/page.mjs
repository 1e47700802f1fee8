/** ComfyUI's interface in Chromium, with nothing of the outside world and no state of earlier runs. */

import { mkdtempSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { join } from "node:path";

const FLAGS = [
  "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
  "--disable-background-networking", "--disable-component-update", "--disable-sync",
];

const SETTINGS = {
  "Comfy.TutorialCompleted": true, // no first-steps dialog
  "Comfy.Notification.ShowVersionUpdates": false,
  "Comfy.Minimap.Visible": false,
  // The front end sets these two at its first start, and trips over itself where it does so too early.
  "Comfy.Canvas.LeftMouseClickBehavior": "panning",
  "Comfy.Canvas.MouseWheelScroll": "zoom",
};

/** Stores settings on the server, where the front end reads them at its start. */
export async function store(url, settings) {
  const answer = await fetch(`${url}/settings`, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(settings),
  });
  if (!answer.ok) throw new Error(`settings were refused: ${answer.status}`);
}

/** Loads the page and waits until the pack's nodes can be placed. */
export async function open(page, url) {
  await page.goto(url, { timeout: 90_000 });
  await page.waitForFunction(
    () => window.app?.vueAppReady && window.LiteGraph?.registered_node_types?.CascadeEmptyLatent,
    null,
    { timeout: 90_000 },
  );
  // The graph of the start comes after the nodes, and would come over one that is placed too early. It is empty
  // where the page is loaded again.
  await page.waitForFunction(() => window.app.graph?._nodes.length > 0, null, { timeout: 6000 }).catch(() => {});
  await page.waitForTimeout(1000); // the canvas takes no double click at once
  await clear(page);
}

/** An empty canvas, whose nodes get ids that none has had: newer front ends keep a widget's value by its node's id. */
export async function clear(page) {
  await page.evaluate(() => {
    // Above those of the examples, which take the count back.
    window.lastNodeId = Math.max(window.lastNodeId ?? 100, window.app.graph.last_node_id);
    window.app.clean?.(); // pictures of earlier nodes
    window.app.graph.clear();
    window.app.graph.last_node_id = window.lastNodeId;
    window.app.canvas.ds.scale = 1;
    window.app.canvas.ds.offset = [0, 0];
    window.app.canvas.setDirty(true, true);
  });
}

/**
 * Starts Chromium, hands its page to a function and ends it, whatever happens.
 * @param {{url: string, chromium: string, nodes2: boolean, locale?: string}} settings
 * @param {(page: object, errors: string[]) => Promise<any>} use errors fill as the page's scripts throw them
 */
export async function withPage({ url, chromium, nodes2, locale = "en" }, use) {
  const require = createRequire(import.meta.url); // unlike import, it heeds NODE_PATH
  const playwright = require("playwright-core");
  const profile = mkdtempSync(join(tmpdir(), "cascade-browser-"));
  await store(url, { ...SETTINGS, "Comfy.Locale": locale, "Comfy.VueNodes.Enabled": nodes2 });
  const context = await playwright.chromium.launchPersistentContext(profile, {
    executablePath: chromium,
    args: FLAGS,
    viewport: { width: 1800, height: 960 },
  });
  try {
    await context.route((address) => address.hostname !== "127.0.0.1", (route) => route.abort());
    const page = context.pages()[0];
    page.setDefaultTimeout(20_000);
    const errors = [];
    page.on("pageerror", (error) => errors.push(error.stack ?? String(error)));
    await open(page, url);
    return await use(page, errors);
  } finally {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  }
}
