/** Settings of both samplers that belong together, from presets.json: chosen on one, set on both as one step of undo. */

import { after, asOneChange, element, findWidget, linked, options, setWidget } from "./panel.js";
import { say } from "./words.js";

const CUSTOM = "";

/** @type {Record<string, Record<string, Record<string, number | string>>>} by name and class of the node */
let presets = {};

export async function loadPresets() {
  const answer = await fetch(new URL("presets.json", import.meta.url));
  presets = await answer.json();
}

const isSampler = (node) => node.comfyClass in presets.published;

/** The nodes that take what one makes, or those that make what it takes. */
const targets = (node) => (node.outputs ?? []).flatMap((_, slot) => node.getOutputNodes(slot) ?? []);
const sources = (node) => (node.inputs ?? []).map((_, slot) => node.getInputNode(slot)).filter(Boolean);

/**
 * The samplers that work on the same picture as one: those that its stage_c leads to, or comes from, with no other
 * sampler between. A second pass is thus left as it is.
 */
function partners(node) {
  const slot = node.inputs.findIndex((input) => input.name === "stage_c");
  const onward = slot < 0 ? targets : sources;
  const waiting = slot < 0 ? targets(node) : [node.getInputNode(slot)].filter(Boolean);
  const seen = new Set([node]);
  const found = [];
  while (waiting.length) {
    const next = waiting.pop();
    if (seen.has(next)) continue;
    seen.add(next);
    if (!isSampler(next)) waiting.push(...onward(next));
    else if (next.comfyClass !== node.comfyClass) found.push(next);
  }
  return found;
}

/** Whether a sampler has a preset's values. */
const has = (node, preset) =>
  Object.entries(preset[node.comfyClass]).every(([name, value]) => findWidget(node, name).value === value);

/** @param {object} node a sampler, just created @returns {HTMLElement} the choice, for its panel */
export function presetChoice(node) {
  const choice = element("select");
  choice.title = say("preset.title");
  options(choice, [
    [CUSTOM, say("preset.custom")],
    ...Object.keys(presets).map((name) => [name, say(`preset.${name}`)]),
  ]);
  const show = () => {
    choice.value = Object.keys(presets).find((name) => has(node, presets[name])) ?? CUSTOM;
  };
  choice.addEventListener("change", () => {
    const preset = presets[choice.value];
    if (preset) {
      asOneChange(() => {
        for (const sampler of [node, ...partners(node)]) {
          for (const [name, value] of Object.entries(preset[sampler.comfyClass])) {
            if (!linked(sampler, name)) setWidget(sampler, name, value);
          }
        }
      });
    }
    show();
  });
  for (const widget of node.widgets) after(widget, "callback", show);
  after(node, "onConfigure", show);
  show();
  return element("div", "cascade-panel-row", [choice]);
}
