/** Sizes on the nodes that decide them: presets, swap, both latents, what was trained. */

import { addPanel, after, asOneChange, element, findWidget, linked, options, setWidget } from "./panel.js";
import {
  AREAS, ASPECTS, COMPRESSION, LARGE_AREAS, chosenSize, decodedVerdict, fittingCompression, presetOf, presetSize, scaledSize,
  secondVerdict, stageBSize, stageCSize, verdict,
} from "./sizes.js";
import { say } from "./words.js";

const CUSTOM = "";
const WIDTH = 300; // the sizes of both latents in one line
const LINKED = "size.linked";
const UNKNOWN = "size.unknown";
const OUTPAINTED_SIDES = ["left", "top", "right", "bottom"];

/** @type {WeakMap<object, {width: number, height: number}>} by node, the picture that its last run took */
const sizesOfRuns = new WeakMap();

const valueOf = (node, name) => findWidget(node, name).value;

/** Sets widgets as a hand would, as one step of undo. */
function set(node, values) {
  asOneChange(() => {
    for (const [name, value] of Object.entries(values)) setWidget(node, name, value);
  });
}

/** The size in the node's own widgets, or LINKED. */
function writtenSize(node) {
  if (linked(node, "width") || linked(node, "height")) return LINKED;
  return { width: valueOf(node, "width"), height: valueOf(node, "height") };
}

/**
 * The size of the picture that comes into the node: as the node shows that it comes from, or as the last run said;
 * null where neither does.
 */
function pictureSize(node) {
  const slot = node.inputs?.findIndex((input) => input.name === "image") ?? -1;
  const source = slot < 0 ? null : node.getInputNode(slot);
  if (source?.comfyClass === "CascadeOutpaint") return outpaintedSize(source);
  const picture = source?.imgs?.[0];
  if (picture?.naturalWidth) return { width: picture.naturalWidth, height: picture.naturalHeight };
  return sizesOfRuns.get(node) ?? null;
}

/** The size that Cascade Outpaint makes of its picture; null where that is not known. */
function outpaintedSize(node) {
  const own = pictureSize(node);
  if (!own || OUTPAINTED_SIDES.some((side) => linked(node, side))) return null;
  const [left, top, right, bottom] = OUTPAINTED_SIDES.map((side) => valueOf(node, side));
  return { width: own.width + left + right, height: own.height + top + bottom };
}

/**
 * Whether Stage C is not to work on a node's latent: it goes to Stage B or to a decoder alone, so that nothing but
 * Stage B's training bounds its size.
 */
function bypassesStageC(node) {
  const targets = (node.getOutputNodes?.(0) ?? []).map((target) => target.comfyClass);
  return targets.length > 0 && targets.every((name) => name === "CascadeDecoderSampler" || name === "CascadeDecode");
}

/**
 * What the nodes differ in.
 *
 * height   of the panel in pixels
 * areas    what is offered to choose from, and `usual` of them; none where a picture decides the size
 * size     the size, or why it is not known here
 * verdict  what to say of it
 * fit      the compression to offer instead of one that was not trained
 */
const KINDS = {
  CascadeEmptyLatent: {
    height: 82, areas: AREAS, usual: "1", size: writtenSize, verdict, fit: fittingCompression,
  },
  CascadeUpscaleLatent: {
    height: 82, areas: LARGE_AREAS, usual: "4", size: writtenSize, verdict: secondVerdict, fit: () => COMPRESSION,
  },
  CascadeEncode: {
    height: 52,
    size(node) {
      const asked = writtenSize(node);
      return asked === LINKED ? LINKED : (chosenSize(pictureSize(node), asked) ?? UNKNOWN);
    },
    verdict: (size, compression, node) =>
      bypassesStageC(node) ? decodedVerdict(size, compression) : verdict(size, compression),
    fit: fittingCompression,
  },
  CascadeSuperResolutionHint: {
    height: 52,
    size(node) {
      if (linked(node, "scale")) return LINKED;
      const small = pictureSize(node);
      return small ? scaledSize(small, valueOf(node, "scale")) : UNKNOWN;
    },
    verdict,
    fit: fittingCompression,
  },
};

const times = ({ width, height }) => `${width} × ${height}`;

/** The presets and the swap; returns their row and a function that shows a size in them. */
function presets(node, { areas, usual }) {
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
  options(area, [[CUSTOM, say("size.custom")], ...areas.map((name) => [name, areaName(name)])]);

  const isTall = () => valueOf(node, "height") > valueOf(node, "width");
  const choose = () => {
    const size = presetSize(aspect.value || "1:1", area.value || usual);
    set(node, isTall() ? { width: size.height, height: size.width } : size);
  };
  aspect.addEventListener("change", () => {
    if (aspect.value === CUSTOM) return;
    if (area.value === "demo") area.value = "1"; // the demo knows one size alone
    choose();
  });
  area.addEventListener("change", () => area.value !== CUSTOM && choose());
  swap.addEventListener("click", () => {
    set(node, { width: valueOf(node, "height"), height: valueOf(node, "width") });
  });

  const show = (size) => {
    for (const control of [aspect, area, swap]) control.disabled = !size;
    const preset = size && presetOf(size, areas);
    fill(Boolean(size) && size.height > size.width);
    aspect.value = preset?.aspect ?? CUSTOM;
    area.value = preset?.area ?? CUSTOM;
  };
  return { row: element("div", "cascade-panel-row", [aspect, area, swap]), show };
}

/** @param {object} node one of KINDS, just created */
export function addSizePanel(node) {
  const kind = KINDS[node.comfyClass];
  const sizes = element("div", "cascade-panel-sizes");
  const judgement = element("div");
  const fit = element("button");
  fit.type = "button";
  const choice = kind.areas ? presets(node, kind) : null;
  const rows = [sizes, element("div", "cascade-panel-row", [judgement, fit])];
  const content = element("div", "", choice ? [choice.row, ...rows] : rows);
  content.style.display = "contents";

  const show = () => {
    const size = kind.size(node);
    const compression = valueOf(node, "compression");
    const unknown = typeof size === "string" ? size : linked(node, "compression") && LINKED;
    choice?.show(typeof size === "string" ? null : size);
    fit.hidden = true;
    sizes.textContent = "";
    if (unknown) {
      judgement.className = "cascade-panel-faint";
      judgement.textContent = say(unknown);
      return;
    }
    const found = kind.verdict(size, compression, node);
    const fine = ["trained", "demo", "second", "decoded"].includes(found);
    sizes.textContent = say("size.latents", {
      stage_c: times(stageCSize(size, compression)),
      stage_b: times(stageBSize(size)),
      compression,
    });
    judgement.className = fine ? "cascade-panel-faint" : "cascade-panel-warning";
    judgement.textContent = say(`size.${found}`);
    const better = kind.fit(size);
    fit.hidden = fine || found === "long" || better === compression;
    fit.textContent = say("size.fit", { value: better });
    fit.onclick = () => set(node, { compression: better });
  };

  addPanel(node, "cascade_size", content, kind.height);
  node.setSize([Math.max(node.size[0], WIDTH), node.size[1]]); // of a new node: a saved one brings its own
  for (const widget of node.widgets) after(widget, "callback", show);
  after(node, "onExecuted", (output) => {
    const picture = output?.cascade_picture?.[0];
    if (picture) sizesOfRuns.set(node, picture);
  });
  after(node, "onConnectionsChange", () => sizesOfRuns.delete(node));
  for (const event of ["onConfigure", "onConnectionsChange", "onExecuted"]) after(node, event, show);
  if (!kind.areas) {
    // A picture is there some time after its node or its new name, and no event tells of it in both kinds of nodes.
    let known = "";
    const looking = setInterval(() => {
      const size = pictureSize(node);
      const now = size ? times(size) : "";
      if (now !== known) {
        known = now;
        show();
      }
    }, 400);
    after(node, "onRemoved", () => clearInterval(looking));
  }
  show();
  return show;
}
