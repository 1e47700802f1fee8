/** Sizes on Cascade Empty Latent and Cascade Encode: presets, swap, both latents, what was trained. */

import { addPanel, after, element } from "./panel.js";
import {
  AREAS, ASPECTS, fittingCompression, presetOf, presetSize, stageBSize, stageCSize, verdict,
} from "./sizes.js";
import { say } from "./words.js";

const CUSTOM = "";
const HEIGHT = { CascadeEmptyLatent: 82, CascadeEncode: 52 };

const find = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Whether a widget's value comes over a link, so that it says nothing here. */
const linked = (node, name) =>
  node.inputs?.some((input) => (input.widget?.name ?? input.name) === name && input.link != null);

/** Sets widgets as a hand would, as one step of undo. */
function set(node, values) {
  node.graph?.beforeChange?.();
  for (const [name, value] of Object.entries(values)) {
    const widget = find(node, name);
    widget.value = value;
    widget.callback?.(value);
  }
  node.graph?.afterChange?.();
  node.graph?.setDirtyCanvas?.(true, true);
}

/** What the two nodes differ in: where the size comes from. null: it is not known here. */
const SIZE_OF = {
  CascadeEmptyLatent(node) {
    if (linked(node, "width") || linked(node, "height")) return null;
    return { width: find(node, "width").value, height: find(node, "height").value };
  },
  CascadeEncode(node) {
    const slot = node.inputs?.findIndex((input) => input.name === "image") ?? -1;
    const picture = slot < 0 ? null : node.getInputNode(slot)?.imgs?.[0];
    return picture?.naturalWidth ? { width: picture.naturalWidth, height: picture.naturalHeight } : null;
  },
};

const UNKNOWN = { CascadeEmptyLatent: "size.linked", CascadeEncode: "size.unknown" };

function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

const times = ({ width, height }) => `${width} × ${height}`;

/** The presets and the swap; returns their row and a function that shows a size in them. */
function presets(node) {
  const aspect = element("select");
  const area = element("select");
  const swap = element("button", "", ["⇄"]);
  aspect.title = say("size.aspect");
  area.title = say("size.area");
  swap.title = say("size.swap");
  swap.type = "button";

  const areaName = (name) => (name === "demo" ? say("size.demoArea") : say("size.megapixels", { value: name }));
  const fill = (tall) => {
    const turned = (name) => (tall ? name.split(":").reverse().join(":") : name);
    options(aspect, [[CUSTOM, say("size.custom")], ...ASPECTS.map((name) => [name, turned(name)])]);
  };
  options(area, [[CUSTOM, say("size.custom")], ...AREAS.map((name) => [name, areaName(name)])]);

  const isTall = () => find(node, "height").value > find(node, "width").value;
  const choose = () => {
    const size = presetSize(aspect.value || "1:1", area.value || "1");
    set(node, isTall() ? { width: size.height, height: size.width } : size);
  };
  aspect.addEventListener("change", () => {
    if (aspect.value === CUSTOM) return;
    if (area.value === "demo") area.value = "1"; // the demo knows one size alone
    choose();
  });
  area.addEventListener("change", () => area.value !== CUSTOM && choose());
  swap.addEventListener("click", () => {
    set(node, { width: find(node, "height").value, height: find(node, "width").value });
  });

  const show = (size) => {
    for (const control of [aspect, area, swap]) control.disabled = !size;
    const preset = size && presetOf(size);
    fill(Boolean(size) && size.height > size.width);
    aspect.value = preset?.aspect ?? CUSTOM;
    area.value = preset?.area ?? CUSTOM;
  };
  return { row: element("div", "cascade-panel-row", [aspect, area, swap]), show };
}

/** @param {object} node a Cascade Empty Latent or a Cascade Encode, just created */
export function addSizePanel(node) {
  const kind = node.comfyClass;
  const sizes = element("div", "cascade-panel-sizes");
  const judgement = element("div");
  const fit = element("button");
  fit.type = "button";
  const choice = kind === "CascadeEmptyLatent" ? presets(node) : null;
  const rows = [sizes, element("div", "cascade-panel-row", [judgement, fit])];
  const content = element("div", "", choice ? [choice.row, ...rows] : rows);
  content.style.display = "contents";

  const show = () => {
    const size = SIZE_OF[kind](node);
    const compression = find(node, "compression").value;
    const known = size && !linked(node, "compression");
    choice?.show(size);
    fit.hidden = true;
    sizes.textContent = "";
    if (!known) {
      judgement.className = "cascade-panel-faint";
      judgement.textContent = say(size ? "size.linked" : UNKNOWN[kind]);
      return;
    }
    const found = verdict(size, compression);
    const fine = found === "trained" || found === "demo";
    sizes.textContent = say("size.latents", {
      stage_c: times(stageCSize(size, compression)),
      stage_b: times(stageBSize(size)),
      compression,
    });
    judgement.className = fine ? "cascade-panel-faint" : "cascade-panel-warning";
    judgement.textContent = say(`size.${found}`);
    const better = fittingCompression(size);
    fit.hidden = fine || found === "long" || better === compression;
    fit.textContent = say("size.fit", { value: better });
    fit.onclick = () => set(node, { compression: better });
  };

  addPanel(node, "cascade_size", content, HEIGHT[kind]);
  for (const widget of node.widgets) after(widget, "callback", show);
  for (const event of ["onConfigure", "onConnectionsChange", "onExecuted"]) after(node, event, show);
  show();
  return show;
}
