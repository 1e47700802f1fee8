/** What a user does in the interface. Each scenario starts on an empty canvas and returns what it saw. */

import { clear, open, store } from "./page.mjs";

/** Places a node as a script would; returns its id. */
const place = (page, type, pos = [400, 200]) =>
  page.evaluate(
    ([type, pos]) => {
      const node = window.LiteGraph.createNode(type);
      node.pos = pos;
      window.app.graph.add(node);
      return node.id;
    },
    [type, pos],
  );

/** Sets a widget as another script would. */
const setWidget = (page, id, name, value) =>
  page.evaluate(
    ([id, name, value]) => {
      const widget = window.app.graph.getNodeById(id).widgets.find((entry) => entry.name === name);
      widget.value = value;
      widget.callback?.(value);
    },
    [id, name, value],
  );

const widgets = (page, id) =>
  page.evaluate((id) => {
    const kept = window.app.graph.getNodeById(id).widgets.filter((widget) => widget.serialize !== false);
    return Object.fromEntries(kept.map((widget) => [widget.name, widget.value]));
  }, id);

const load = (page, name, graph) =>
  page.evaluate(async ([name, graph]) => window.app.loadGraphData(graph, true, true, name), [name, graph]);

/** The pack's subgraph. Older versions tell of the models that it lacks in a dialog over everything. */
async function loadSubgraph(page, subgraph, served) {
  await load(page, "subgraph", subgraph);
  if (served) return;
  const dialog = page.locator(".p-dialog");
  await dialog.waitFor();
  await page.keyboard.press("Escape");
  await dialog.waitFor({ state: "hidden" });
}

/** The words in the panel of a node, wherever the interface puts it. */
const panel = (page, id, name) =>
  page.evaluate(
    ([id, name]) => {
      const widget = window.app.graph.getNodeById(id).widgets.find((entry) => entry.name === name);
      const shown = widget.element.isConnected && widget.element.getBoundingClientRect().height > 0;
      return { shown, lines: widget.element.innerText.split("\n").filter((line) => line.trim()) };
    },
    [id, name],
  );

/** The sentences of a node's panel: those within its room, and those that a press on it shows. */
async function sentencesOf(page, id, name) {
  const box = await page.evaluateHandle(
    ([id, name]) => {
      const widget = window.app.graph.getNodeById(id).widgets.find((entry) => entry.name === name);
      return widget.element.querySelector(".cascade-panel-text");
    },
    [id, name],
  );
  const lines = await box.evaluate((button) => button.innerText.split("\n").filter(Boolean));
  if (!lines.length) return { lines };
  await page.evaluate(() => {
    window.app.canvas.setDirty(true, true); // a panel stands where it was drawn last
    return new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
  });
  await box.click();
  const all = page.locator(".cascade-panel-all:popover-open");
  await all.waitFor();
  const pressed = await all.evaluate((element) => {
    const { top, left, right, bottom } = element.getBoundingClientRect();
    const { innerWidth, innerHeight } = window;
    const whole = element.scrollHeight <= element.clientHeight && right <= innerWidth && bottom <= innerHeight;
    return { all: element.innerText.split("\n"), whole: whole && left >= 0 && top >= 0 };
  });
  await page.keyboard.press("Escape");
  await all.waitFor({ state: "hidden" });
  const within = await box.evaluate((button) => {
    const panel = button.closest(".cascade-panel").getBoundingClientRect();
    return button.getBoundingClientRect().bottom <= panel.bottom + 1;
  });
  return { lines, within, ...pressed };
}

/** Pairs of nodes on the canvas that lie over each other, with their titles. */
const overlaps = (page) =>
  page.evaluate(() => {
    const boxes = window.app.graph._nodes.map((node) => ({ node, box: [...node.getBounding()] }));
    const apart = ([x, y, w, h], [left, top, width, height]) =>
      x + w <= left || left + width <= x || y + h <= top || top + height <= y;
    return boxes.flatMap(({ node, box }, index) =>
      boxes.slice(index + 1).filter((other) => !apart(box, other.box)).map((other) => [node.type, other.node.type]),
    );
  });

/** Where a point of the graph is on the screen. */
const onScreen = (page, id, input, slot) =>
  page.evaluate(
    ([id, input, slot]) => {
      const key = `${id}-${input ? "in" : "out"}-${slot}`;
      const dot = document.querySelector(`[data-slot-key="${key}"]`);
      if (dot) {
        const box = dot.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2];
      }
      const { canvas } = window.app;
      const [x, y] = window.app.graph.getNodeById(id).getConnectionPos(input, slot);
      const box = canvas.canvas.getBoundingClientRect();
      return [box.x + (x + canvas.ds.offset[0]) * canvas.ds.scale, box.y + (y + canvas.ds.offset[1]) * canvas.ds.scale];
    },
    [id, input, slot],
  );

async function drag(page, from, to) {
  await page.mouse.move(...from);
  await page.mouse.down();
  await page.mouse.move((from[0] + to[0]) / 2, (from[1] + to[1]) / 2, { steps: 4 });
  await page.mouse.move(...to, { steps: 4 });
  await page.mouse.up();
  await page.waitForTimeout(150);
}

/** Double clicks on the empty canvas until it answers: it does not while it is still placing a node. */
async function openSearch(page) {
  const field = page.locator("input[role=combobox]").first();
  for (let attempt = 0; attempt < 12 && !(await field.isVisible()); attempt++) {
    await page.mouse.dblclick(900, 500);
    await field.waitFor({ timeout: 600 }).catch(() => {}); // the next attempt, or fill, says it
  }
  return field;
}

/** Every node is found under its name by the search that a double click opens, and dropped by Enter. */
async function search(page, { names }) {
  const found = {};
  for (const name of names) {
    await clear(page);
    const field = await openSearch(page);
    await field.fill(name);
    await page.waitForTimeout(350); // the list follows the words with a short delay
    await page.keyboard.press("Enter");
    await page.waitForFunction(() => window.app.graph._nodes.length > 0);
    found[name] = await page.evaluate(() => window.app.graph._nodes.map((node) => node.type));
    await page.mouse.click(300, 850); // where the node is not: lets go of one that follows the mouse
    await field.waitFor({ state: "hidden" });
  }
  return found;
}

/** The names that the search lists for words that people look for. */
async function words(page, { words }) {
  const listed = {};
  for (const word of words) {
    await clear(page);
    const field = await openSearch(page);
    await field.fill(word);
    await page.waitForFunction((word) => document.querySelector("input[role=combobox]").value === word, word);
    await page.waitForTimeout(350); // the list follows the words with a short delay
    listed[word] = await page.evaluate(() =>
      [...document.querySelectorAll("[role=option], [data-testid='result-item']")].map((entry) => entry.innerText),
    );
    await page.keyboard.press("Escape");
    await field.waitFor({ state: "hidden" });
  }
  return listed;
}

/** The examples load whole, and make the prompts of their API files. */
async function examples(page, { workflows }) {
  const seen = {};
  for (const [name, graph] of Object.entries(workflows)) {
    await load(page, name, graph);
    seen[name] = await page.evaluate(async () => {
      const nodes = window.app.graph._nodes;
      const { output, workflow } = await window.app.graphToPrompt();
      return {
        unknown: nodes.filter((node) => !window.LiteGraph.registered_node_types[node.type]).map((n) => n.type),
        count: nodes.length,
        groups: window.app.graph._groups.length,
        prompt: output,
        values: Object.fromEntries(workflow.nodes.map((node) => [node.id, node.widgets_values])),
      };
    });
    seen[name].missing = await missingModels(page);
  }
  return seen;
}

/** What the interface says of models that the server lacks: in a dialog, or in a panel behind a button. */
async function missingModels(page) {
  await page.waitForTimeout(1200); // it comes after the graph
  const details = page.getByRole("button", { name: "View details" });
  if (await details.isVisible()) await details.click();
  await page.waitForTimeout(300);
  const text = await page.evaluate(() =>
    [...document.querySelectorAll("[role=dialog], .p-dialog, [data-testid='properties-panel']")]
      .map((place) => place.innerText)
      .join("\n"),
  );
  await page.keyboard.press("Escape");
  return text;
}

/** The template browser has the pack's graphs under its name, in order; a card shows its picture, and opens. */
async function templates(page, { titles, title }) {
  await page.evaluate(() => window.app.extensionManager.command.execute("Comfy.BrowseTemplates"));
  // Without waiting until the dialog with its many pictures is at rest.
  await page.getByText("Stable Cascade", { exact: true }).first().click({ force: true });
  const card = page.getByText(title).first();
  await card.scrollIntoViewIfNeeded();
  await page.waitForFunction(() =>
    [...document.querySelectorAll("[role=dialog] img")].some((image) => image.src.startsWith("blob:") && image.naturalWidth),
  );
  const listed = await page.waitForFunction((titles) => {
    const cards = [...document.querySelectorAll("[role=dialog] *")].filter(
      (entry) => !entry.children.length && titles.includes(entry.textContent.trim()),
    );
    cards.at(-1).scrollIntoView(); // older versions show more once the last is seen
    const seen = [...new Set(cards.map((entry) => entry.textContent.trim()))];
    return seen.length === titles.length ? seen : null;
  }, titles);
  await card.click({ force: true });
  await page.waitForFunction((title) => window.app.extensionManager.workflow.activeWorkflow.filename === title, title);
  return { listed: await listed.jsonValue(), count: await page.evaluate(() => window.app.graph._nodes.length) };
}

/** The button makes a picture, and it appears in its node. */
async function run(page, { workflows, settings }) {
  await load(page, "text_to_image", workflows.text_to_image);
  for (const [id, name, value] of settings) await setWidget(page, id, name, value);
  const before = [await panel(page, 7, "cascade_run"), await panel(page, 8, "cascade_run")];
  await page.getByRole("button", { name: "Run", exact: true }).first().click();
  const picture = await page.waitForFunction(
    () => {
      const node = window.app.graph.getNodeById(10);
      const shown = document.querySelector('[data-node-id="10"] img') ?? node.imgs?.[0];
      return shown?.naturalWidth ? { width: shown.naturalWidth, height: shown.naturalHeight, src: shown.src } : null;
    },
    null,
    { timeout: 90_000 },
  );
  const after = [await panel(page, 7, "cascade_run"), await panel(page, 8, "cascade_run")];
  // All that nodes may say besides: still each has its room.
  await page.evaluate(() => {
    const { graph } = window.app;
    const text = Array(3).fill("ModelSamplingStableCascade changes nothing in the network, and says so at length.");
    for (const id of [7, 8]) graph.getNodeById(id).onExecuted({ text });
    graph.getNodeById(5).onExecuted({ cascade_syntax: [["lora", "<lora:ink:1>"], ["break", "BREAK"], ["choice", "{a|b}"]] });
  });
  await page.getByText("<lora:ink:1>").first().waitFor();
  await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
  return {
    before: before.map(({ lines }) => lines), picture: await picture.jsonValue(), after, overlaps: await overlaps(page),
  };
}

/** Presets, swap, readout and the fitting compression on Cascade Empty Latent. */
async function sizes(page) {
  const id = await place(page, "CascadeEmptyLatent");
  await page.waitForTimeout(300);
  const steps = [];
  const note = async (what) => {
    steps.push({ what, widgets: await widgets(page, id), ...(await panel(page, id, "cascade_size")) });
  };
  const selects = page.locator(".cascade-panel select");
  const buttons = page.locator(".cascade-panel button:visible");
  await note("new");
  await selects.nth(0).selectOption("16:9");
  await note("16:9");
  await buttons.first().click();
  await note("swapped");
  await selects.nth(1).selectOption("2");
  await note("2 megapixels");
  await buttons.last().click();
  await note("fitted");
  await selects.nth(1).selectOption("demo");
  await setWidget(page, id, "compression", 42.67);
  await note("demo");
  await setWidget(page, id, "height", 2048);
  await note("set by hand");
  const saved = await page.evaluate(() => window.app.graph.serialize().nodes[0].widgets_values);
  const { output } = await page.evaluate(() => window.app.graphToPrompt());
  return { steps, saved, sent: output[String(id)].inputs, presets: await selects.nth(0).locator("option").count() };
}

/** Each press of Control + Z takes back one thing that was done in a panel. */
async function undo(page) {
  const id = await place(page, "CascadeEmptyLatent");
  await page.evaluate(() => {
    window.app.canvas.emitBeforeChange(); // as if the node had been placed by hand
    window.app.canvas.emitAfterChange();
  });
  await page.waitForTimeout(300);
  const selects = page.locator(".cascade-panel select");
  const swap = page.locator(".cascade-panel button:visible").first();
  const seen = [];
  const note = async () => {
    const { width, height } = await widgets(page, id);
    seen.push([width, height]);
  };
  await note();
  await selects.nth(0).selectOption("16:9");
  await note();
  await swap.click();
  await note();
  await selects.nth(1).selectOption("2");
  await note();
  const done = [...seen];
  seen.length = 0;
  for (const size of done.slice(0, -1).reverse()) {
    await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
    await page.keyboard.press("Control+z");
    await page.waitForFunction(
      ([id, [width, height]]) => {
        const values = Object.fromEntries(
          (window.app.graph.getNodeById(id)?.widgets ?? []).map((widget) => [widget.name, widget.value]),
        );
        const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
        return values.width === width && values.height === height && !tracker._restoringState; // it takes no key till then
      },
      [id, size],
    );
    await note();
  }
  return { done, undone: seen };
}

/** A preset chosen on one sampler sets the other of its picture as well, as one step of undo. */
async function presets(page, { workflows }) {
  const samplers = async () => {
    const ids = await page.evaluate(() =>
      window.app.graph._nodes.filter((node) => node.type.endsWith("Sampler")).map((node) => node.id).sort((a, b) => a - b),
    );
    return Promise.all(
      ids.map((id) =>
        page.evaluate((id) => {
          const { widgets } = window.app.graph.getNodeById(id);
          const value = (name) => widgets.find((widget) => widget.name === name).value;
          const panel = widgets.find((widget) => widget.name === "cascade_run").element;
          return {
            id: Number(id), shown: panel.querySelector("select").value,
            settings: Object.fromEntries(["steps", "cfg", "cfg_rescale", "shift", "sampler"].map((name) => [name, value(name)])),
          };
        }, id),
      ),
    );
  };
  const choose = async (id, preset) => {
    const select = await page.evaluateHandle(
      (id) =>
        window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === "cascade_run").element.querySelector("select"),
      id,
    );
    await select.selectOption(preset);
    return samplers();
  };
  await load(page, "text_to_image", workflows.text_to_image);
  await page.waitForTimeout(300);
  const before = await samplers();
  const few = await choose(7, "few");
  const detail = await choose(8, "detail");
  await page.evaluate(() => new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn))));
  await page.keyboard.press("Control+z");
  await page.waitForFunction(() => {
    const value = (id) => window.app.graph.getNodeById(id)?.widgets.find((widget) => widget.name === "steps").value;
    const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker;
    return value(7) === 10 && value(8) === 5 && !tracker._restoringState;
  });
  const undone = await samplers();
  await load(page, "high_resolution", workflows.high_resolution);
  await page.waitForTimeout(300);
  const passes = await samplers();
  return { before, few, detail, undone, passes, set: await choose(passes[1].id, "published") };
}

/** Presets reach the other sampler over a subgraph's border, and both from the menu of a box that holds them. */
async function borders(page, { workflows, subgraph, served }) {
  const settings = () =>
    page.evaluate(() => {
      const { graph } = window.app;
      const nodes = [graph, ...graph.subgraphs.values()].flatMap((part) => part.nodes);
      const samplers = nodes.filter((node) => node.comfyClass?.endsWith("Sampler"));
      const names = ["steps", "cfg", "cfg_rescale", "shift", "sampler"];
      const value = (node, name) => node.widgets.find((widget) => widget.name === name).value;
      return Object.fromEntries(
        samplers.map((node) => [node.comfyClass, Object.fromEntries(names.map((name) => [name, value(node, name)]))]),
      );
    });
  const choose = (type, preset) =>
    page.evaluate(
      ([type, preset]) => {
        const { graph } = window.app;
        const nodes = [graph, ...graph.subgraphs.values()].flatMap((part) => part.nodes);
        const node = nodes.find((entry) => entry.comfyClass === type);
        const select = node.widgets.find((widget) => widget.name === "cascade_run").element.querySelector("select");
        select.value = preset;
        select.dispatchEvent(new Event("change"));
      },
      [type, preset],
    );
  const fromMenu = (entry) =>
    page.evaluate((entry) => {
      const { graph, canvas } = window.app;
      const box = graph.nodes.find((node) => node.subgraph);
      const menu = canvas.getNodeMenuOptions(box).find((option) => option?.content === "Stable Cascade settings");
      menu.submenu.options.find((option) => option.content === entry).callback();
    }, entry);
  const seen = {};
  await load(page, "text_to_image", workflows.text_to_image);
  await page.evaluate(() => {
    const { graph } = window.app;
    graph.convertToSubgraph(new Set([graph.nodes.find((node) => node.comfyClass === "CascadeDecoderSampler")]));
  });
  await choose("CascadePriorSampler", "few");
  seen.into = await settings();
  await choose("CascadeDecoderSampler", "detail");
  seen.outOf = await settings();
  await fromMenu("published");
  seen.menu = await settings();
  // A widget that was led out to the box is set there.
  seen.ledOut = await page.evaluate(() => {
    const { graph } = window.app;
    const box = graph.nodes.find((node) => node.subgraph);
    const sampler = box.subgraph.nodes.find((node) => node.comfyClass === "CascadeDecoderSampler");
    const slot = sampler.inputs.find((input) => input.name === "steps");
    box.subgraph.addInput("steps", "INT").connect(slot, sampler);
    return box.widgets.map((widget) => widget.name);
  });
  await choose("CascadePriorSampler", "few");
  seen.box = await page.evaluate(
    () => window.app.graph.nodes.find((node) => node.subgraph).widgets.find((widget) => widget.name === "steps").value,
  );
  await loadSubgraph(page, subgraph, served);
  await fromMenu("high detail");
  seen.whole = await settings();
  return seen;
}

/** Cascade Encode behind other nodes than Load Image, and where Stage B alone takes its latent. */
async function behind(page, { workflows }) {
  await load(page, "outpaint", workflows.outpaint);
  const padded = await sizesShown(page, 8);
  await load(page, "high_resolution", workflows.high_resolution);
  return { padded, second: await sizesShown(page, 11) };
}

/** A picture of another node than Load Image: its size comes with the run. */
async function made(page) {
  const id = await place(page, "CascadeEncode");
  await page.waitForTimeout(300);
  const before = await panel(page, id, "cascade_size");
  await page.evaluate(
    (id) => window.app.api.dispatchCustomEvent("executed", {
      node: String(id), display_node: String(id), output: { cascade_picture: [{ width: 1280, height: 720 }] },
    }),
    id,
  );
  return { before, after: await sizesShown(page, id) };
}

/** A button lies whole within its panel, also beside the longest sentence. */
async function buttons(page) {
  const id = await place(page, "CascadeEmptyLatent");
  await setWidget(page, id, "width", 256);
  await setWidget(page, id, "height", 320);
  await page.waitForTimeout(300);
  return page.evaluate((id) => {
    const { element } = window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === "cascade_size");
    const outer = element.getBoundingClientRect();
    const button = [...element.querySelectorAll("button")].at(-1);
    const inner = button.getBoundingClientRect();
    return {
      text: button.textContent,
      whole: button.scrollWidth <= button.clientWidth && inner.right <= outer.right + 1 && inner.bottom <= outer.bottom + 1,
      panel: element.scrollHeight <= element.clientHeight,
    };
  }, id);
}

/** Presets and readout on Cascade Upscale Latent, whose sizes are larger and whose Stage C has composed already. */
async function enlarge(page) {
  const id = await place(page, "CascadeUpscaleLatent");
  await page.waitForTimeout(300);
  const steps = [];
  const note = async (what) => {
    steps.push({ what, widgets: await widgets(page, id), ...(await panel(page, id, "cascade_size")) });
  };
  const selects = page.locator(".cascade-panel select");
  await note("new");
  await selects.nth(0).selectOption("3:2");
  await note("3:2");
  await selects.nth(1).selectOption("8");
  await note("8 megapixels");
  await setWidget(page, id, "compression", 80);
  await note("untrained");
  await page.locator(".cascade-panel button:visible").last().click();
  await note("fitted");
  return { steps };
}

/** Waits until a node shows a picture, which may be another than the one it showed before. */
const pictureShown = (page, id, picture) =>
  page.waitForFunction(
    ([id, picture]) => {
      const shown = window.app.graph.getNodeById(id).imgs?.[0];
      return shown?.naturalWidth && new URL(shown.src).searchParams.get("filename") === picture;
    },
    [id, picture],
  );

/** Places a picture's node and one that takes it; returns both ids once the picture is loaded. Not connected yet. */
async function placeWithPicture(page, type, picture) {
  const source = await place(page, "LoadImage", [100, 200]);
  const first = (await widgets(page, source)).image;
  await pictureShown(page, source, first); // one that comes after the chosen one would take its place
  await setWidget(page, source, "image", picture);
  const id = await place(page, type, [700, 200]);
  await pictureShown(page, source, picture);
  return [source, id];
}

/** A node's panel of sizes, once it shows any: it looks for its picture now and then. */
async function sizesShown(page, id) {
  await page.waitForFunction(
    (id) => {
      const panel = window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === "cascade_size");
      return panel.element.querySelector(".cascade-panel-sizes").textContent;
    },
    id,
  );
  return panel(page, id, "cascade_size");
}

const connectPicture = (page, source, id) =>
  page.evaluate(
    ([source, id]) => {
      const target = window.app.graph.getNodeById(id);
      window.app.graph.getNodeById(source).connect(0, target, target.findInputSlot("image"));
    },
    [source, id],
  );

/** Cascade Encode shows the sizes of the picture that is connected to it, and of what it resizes it to. */
async function encode(page, { picture, workflows }) {
  const [source, id] = await placeWithPicture(page, "CascadeEncode", picture);
  const seen = { unknown: await panel(page, id, "cascade_size") };
  await setWidget(page, id, "width", 512);
  await setWidget(page, id, "height", 512);
  seen.asked = await panel(page, id, "cascade_size");
  await setWidget(page, id, "width", 0);
  await setWidget(page, id, "height", 0);
  await connectPicture(page, source, id);
  seen.known = await sizesShown(page, id);
  await setWidget(page, id, "height", 1104);
  seen.resized = await panel(page, id, "cascade_size");
  await load(page, "inpaint", workflows.inpaint); // its picture comes later than its nodes
  const [first, second] = await page.evaluate(() =>
    ["LoadImage", "CascadeEncode"].map((type) => window.app.graph._nodes.find((node) => node.type === type).id),
  );
  await pictureShown(page, first, await page.evaluate(
    (id) => window.app.graph.getNodeById(id).widgets.find((widget) => widget.name === "image").value, first,
  ));
  await page.evaluate(() => new Promise((resolve) => setTimeout(resolve, 900))); // after the panel has looked once more
  seen.loaded = await sizesShown(page, second);
  return seen;
}

/** Cascade Super Resolution Hint shows the sizes of the picture that is to be made. */
async function scale(page, { picture }) {
  const [source, id] = await placeWithPicture(page, "CascadeSuperResolutionHint", picture);
  const unknown = await panel(page, id, "cascade_size");
  await connectPicture(page, source, id);
  const twice = await sizesShown(page, id);
  await setWidget(page, id, "scale", 1.3);
  return { unknown, twice, less: await panel(page, id, "cascade_size") };
}

/** A node's panel shows the sentences that the server sends when it has run. */
async function sentences(page) {
  const id = await place(page, "CascadeLoRAApply");
  await page.waitForTimeout(300);
  const before = await panel(page, id, "cascade_text");
  await page.evaluate(
    (id) => window.app.api.dispatchCustomEvent("executed", {
      node: String(id), display_node: String(id), output: { text: ["style (kohya): rank 4.", "Left out: two."] },
    }),
    id,
  );
  await page.waitForTimeout(200);
  return { before, after: await panel(page, id, "cascade_text") };
}

/** A sampler has room for sentences about its run. */
async function notices(page) {
  const id = await place(page, "CascadePriorSampler");
  const tell = (output) => page.evaluate(([id, output]) => window.app.graph.getNodeById(id).onExecuted(output), [id, output]);
  const size = () => page.evaluate((id) => [...window.app.graph.getNodeById(id).size], id);
  await tell({});
  const seen = { before: await sentencesOf(page, id, "cascade_run"), size: await size() };
  await tell({ text: ["The MODEL's own guidance is used.", "shift is not.", "a third, which is ".repeat(20)] });
  await page.getByText("The MODEL's own guidance is used.").first().waitFor();
  seen.after = await sentencesOf(page, id, "cascade_run");
  seen.sizeAfter = await size();
  await tell({});
  return { ...seen, later: await sentencesOf(page, id, "cascade_run") };
}

/** What a prompt holds of other programs' syntax is named in its node after the run, and no longer at the next. */
async function syntax(page) {
  const id = await place(page, "CascadeTextEncode");
  const node = String(id);
  const output = { cascade_syntax: [["lora", "<lora:ink:1>"], ["break", "BREAK"], ["schedule", "[a:b:0.5]"], ["choice", "{a|b}"]] };
  await page.evaluate(
    ([node, output]) => window.app.api.dispatchCustomEvent("executed", { node, display_node: node, output }),
    [node, output],
  );
  await page.getByText("<lora:ink:1>").first().waitFor();
  const told = await sentencesOf(page, id, "cascade_syntax");
  await page.evaluate(() => window.app.api.dispatchCustomEvent("execution_start", { prompt_id: "another" }));
  return { told, later: await sentencesOf(page, id, "cascade_syntax") };
}

/** The values of a training node, as the interface has them. */
async function training(page) {
  const id = await place(page, "CascadeTrainLoRA");
  await page.waitForTimeout(300);
  return { widgets: await widgets(page, id) };
}

/** A link dragged to a socket of another type is refused; the same drag to the right one is not. */
async function connections(page) {
  const vae = await place(page, "StageAVAE", [300, 150]);
  const model = await place(page, "StageCLoader", [300, 400]);
  const sampler = await place(page, "CascadePriorSampler", [900, 150]);
  await page.waitForTimeout(500);
  const linked = () =>
    page.evaluate((id) => {
      const { link } = window.app.graph.getNodeById(id).inputs[0];
      return link === null ? null : window.app.graph.getLink(link).origin_id;
    }, sampler);
  const socket = await onScreen(page, sampler, true, 0);
  await drag(page, await onScreen(page, vae, false, 0), socket);
  const wrong = await linked();
  await page.keyboard.press("Escape");
  await page.waitForTimeout(500);
  await drag(page, await onScreen(page, model, false, 0), socket);
  return { wrong, right: (await linked()) === model };
}

/** ComfyUI's own nodes, replaced from their menu by ours, with their values and links. */
async function replaced(page) {
  await page.evaluate(async () => {
    const { graph, canvas } = window.app;
    const add = (type) => {
      const node = window.LiteGraph.createNode(type);
      graph.add(node);
      return node;
    };
    const [size, picture, encode, prior, hint, preview] = [
      "StableCascade_EmptyLatentImage", "LoadImage", "StableCascade_StageC_VAEEncode", "KSampler",
      "StableCascade_SuperResolutionControlnet", "PreviewImage",
    ].map(add); // prettier-ignore
    size.widgets.find((widget) => widget.name === "width").value = 1152;
    encode.widgets.find((widget) => widget.name === "compression").value = 32;
    Object.assign(size, { mode: 4, title: "mine", color: "#322" });
    const input = (node, name) => node.inputs.findIndex((entry) => entry.name === name);
    size.connect(0, prior, input(prior, "latent_image"));
    picture.connect(0, encode, input(encode, "image"));
    picture.connect(0, hint, input(hint, "image"));
    hint.connect(0, preview, 0);
    for (const node of [size, encode, hint]) {
      const options = canvas.getNodeMenuOptions(node);
      options.find((option) => option?.content?.includes("Cascade ")).callback();
    }
  });
  return page.evaluate(() => {
    const { nodes } = window.app.graph.serialize();
    const type = (id) => nodes.find((node) => String(node.id) === String(id)).type;
    const links = [...window.app.graph.links.values()];
    const [size] = window.app.graph.findNodesByType("CascadeEmptyLatent");
    const [encode] = window.app.graph.findNodesByType("CascadeEncode");
    const value = (node, name) => node.widgets.find((widget) => widget.name === name).value;
    return {
      types: nodes.map((node) => node.type).sort(),
      links: links.map((link) => [type(link.origin_id), link.origin_slot, type(link.target_id)].join(" ")).sort(),
      size: [value(size, "width"), value(size, "compression"), size.mode, size.title, size.color],
      encode: [value(encode, "compression"), encode.mode, encode.title],
    };
  });
}

/** The pack's subgraphs, where the server offers some, and on the canvas: their widgets, and the prompts they become. */
async function subgraph(page, { subgraph, demo, served }) {
  const offered = "document.querySelector('#vue-app').__vue_app__.config.globalProperties.$pinia._s.get('subgraph')";
  const seen = [];
  for (const graph of [demo, subgraph]) {
    const [{ name }] = graph.definitions.subgraphs;
    if (served) {
      await page.waitForFunction(`${offered}.subgraphBlueprints.some((entry) => entry.display_name === "${name}")`);
    }
    if (graph === demo) await load(page, "subgraph", graph); // whose models are there
    else await loadSubgraph(page, graph, served);
    const made = await page.evaluate(async () => {
      const { graph } = window.app;
      const box = graph.nodes[0];
      const save = window.LiteGraph.createNode("SaveImage");
      graph.add(save);
      box.connect(0, save, 0);
      for (const [name, value] of Object.entries({ prompt: "a red star", negative: "", width: 256, height: 256, seed: 7 })) {
        const widget = box.widgets.find((entry) => entry.name === name);
        widget.value = value;
        widget.callback?.(value);
      }
      const { output } = await window.app.graphToPrompt();
      return { widgets: box.widgets.map((widget) => widget.name), output };
    });
    seen.push(made);
  }
  return { demo: seen[0], published: seen[1] };
}

/** An error of a run and a refused file, as the Japanese interface tells of them, and what a LoRA holds. */
async function japaneseErrors(page) {
  await clear(page);
  await page.evaluate(() => {
    const { graph } = window.app;
    const [size, vae, decode, save] = ["CascadeEmptyLatent", "StageAVAE", "CascadeDecode", "SaveImage"].map((type) => {
      const node = window.LiteGraph.createNode(type);
      graph.add(node);
      return node;
    });
    size.connect(0, decode, decode.findInputSlot("samples"));
    vae.connect(0, decode, decode.findInputSlot("vae"));
    decode.connect(0, save, 0);
  });
  const run = await page.evaluate(async () => {
    const { api } = window.app;
    const error = new Promise((resolve) => api.addEventListener("execution_error", resolve, { once: true }));
    await window.app.queuePrompt(0, 1); // while it is at it, it takes no other
    return (await error).detail.exception_message;
  });
  const refused = await page.evaluate(async () => {
    const loader = window.app.graph._nodes.find((node) => node.type === "StageAVAE");
    loader.widgets.find((widget) => widget.name === "file").value = "gone.safetensors";
    await window.app.queuePrompt(0, 1);
    return window.app.lastNodeErrors[loader.id].errors[0].details;
  });
  await page.keyboard.press("Escape");
  const notice = await page.evaluate(async () => {
    const { api } = window.app;
    const texts = [];
    const heard = ({ detail }) => texts.push(detail.text);
    api.addEventListener("progress_text", heard);
    api.dispatchCustomEvent("progress_text", { nodeId: "1", text: "steps is 0; at least 1 is needed." });
    await null; // what was queued in between
    api.removeEventListener("progress_text", heard);
    return texts;
  });
  await clear(page);
  const lora = await place(page, "CascadeLoRAApply");
  await page.evaluate(
    (id) => window.app.graph.getNodeById(id).onExecuted({
      text: [
        "a.safetensors (kohya): 12 layers of Stage C, rank 4 to 8, 1 learned token ([star])",
        "a.safetensors says of itself: trigger words ink, red; rank 4.",
        "Of another node.",
      ],
    }),
    lora,
  );
  await page.getByText("[star]").first().waitFor();
  return { run, refused, notice, lora: (await panel(page, lora, "cascade_text")).lines };
}

/** The same nodes in Japanese, with their help, and an example with its notes. */
async function japanese(page, { url, workflows }) {
  await store(url, { "Comfy.Locale": "ja" });
  await open(page, url);
  await load(page, "few_steps", workflows.few_steps);
  const example = await page.evaluate(async () => ({
    groups: window.app.graph._groups.map((group) => group.title),
    note: window.app.graph._nodes.find((node) => node.type === "MarkdownNote").widgets[0].value,
    changed: window.app.extensionManager.workflow.activeWorkflow.isModified,
  }));
  await page.getByText(example.note.split("**")[0]).first().waitFor();
  await clear(page);
  const sampler = await place(page, "CascadePriorSampler", [300, 200]);
  const latent = await place(page, "CascadeEmptyLatent", [800, 200]);
  await page.waitForTimeout(500);
  const words = await page.evaluate(
    (ids) =>
      ids.map((id) => {
        const node = window.app.graph.getNodeById(id);
        return {
          title: node.title,
          inputs: node.inputs.map((input) => input.label ?? input.localized_name ?? input.name),
          outputs: node.outputs.map((output) => output.label ?? output.localized_name ?? output.name),
          widgets: node.widgets.filter((w) => w.serialize !== false).map((widget) => widget.label ?? widget.name),
        };
      }),
    [sampler, latent],
  );
  const panels = [await panel(page, sampler, "cascade_run"), await panel(page, latent, "cascade_size")];
  await page.evaluate(
    (id) => window.app.graph.getNodeById(id).onExecuted({
      text: ["In English."], cascade_notices: [["sampler", { key: "'a_key'" }]],
    }),
    sampler,
  );
  await page.getByText("'a_key'").first().waitFor();
  const notice = await panel(page, sampler, "cascade_run");
  await page.evaluate((id) => window.app.canvas.selectNode(window.app.graph.getNodeById(id)), sampler);
  // The button may lie under the menu: it is pressed as the keyboard would.
  await page.locator("[data-testid='info-button']").dispatchEvent("click");
  const help = page.locator(".node-help-content");
  await help.locator("h1, h2").first().waitFor();
  const seen = { example, words, panels, notice, help: await help.innerText() };
  const templates = await page.evaluate(async () => {
    const { api } = window.app;
    const listed = Object.entries(await api.getWorkflowTemplates()).flatMap(([pack, names]) => names.map((name) => [pack, name]));
    return Promise.all(
      listed.map(async ([pack, title]) => {
        const [graph, picture] = await Promise.all(
          ["json", "jpg"].map((ending) => fetch(api.apiURL(`/workflow_templates/${pack}/${title}.${ending}`))),
        );
        return { title, nodes: (await graph.json()).nodes.length, picture: picture.ok };
      }),
    );
  });
  return { ...seen, templates, told: await japaneseErrors(page) };
}

export const SCENARIOS = {
  search, words, examples, templates, sizes, undo, presets, borders, behind, made, buttons, enlarge, encode, scale, sentences, notices, syntax, training, connections, replaced,
  subgraph, run, japanese,
};
