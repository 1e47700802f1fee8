/** In the menu of ComfyUI's own Stable Cascade nodes: to put ours in their place, with its values and links. */

import { app } from "../../scripts/app.js";
import { after } from "./panel.js";
import { say } from "./words.js";

/**
 * @typedef {{new_id: string, old_id?: string, set_value?: unknown}} InputMapping
 * @typedef {{old_idx: number, new_idx: number}} OutputMapping
 * @typedef {{old_node_id: string, new_node_id: string, input_mapping: InputMapping[],
 *   output_mapping: OutputMapping[]}} Replacement
 */

/** @type {Replacement[]} the table that ComfyUI's own list of replacements gets, too */
let replacements = [];

/** ComfyUI's own values, for which ours has another; what else stands there was chosen, and is kept. */
const THEIRS = { compression: 42 };
/** What a person gave the node itself. */
const OWN = ["mode", "color", "bgcolor"];

export async function loadReplacements() {
  const answer = await fetch(new URL("replacements.json", import.meta.url));
  replacements = await answer.json();
}

/** @param {object} node any, just created */
export function offerReplacement(node) {
  const replacement = replacements.find((entry) => entry.old_node_id === node.comfyClass);
  if (!replacement) return;
  after(node, "getExtraMenuOptions", (_canvas, options) => {
    const name = window.LiteGraph.registered_node_types[replacement.new_node_id].title;
    options.push({ content: say("replace.with", { name }), callback: () => replace(node, replacement) });
  });
}

/** What an input of ours gets; undefined: what it begins with. */
function valueFor(node, { new_id, old_id, set_value }) {
  const theirs = node.widgets?.find((entry) => entry.name === (old_id ?? new_id))?.value;
  if (old_id) return theirs;
  return theirs === undefined || theirs === THEIRS[new_id] ? set_value : theirs;
}

/**
 * @param {object} node
 * @param {Replacement} replacement
 */
function replace(node, { new_node_id, input_mapping, output_mapping }) {
  const { graph } = node;
  const successor = window.LiteGraph.createNode(new_node_id);
  successor.pos = [...node.pos];
  graph.beforeChange();
  graph.add(successor);
  for (const key of OWN) if (node[key] !== undefined) successor[key] = node[key];
  if (node.title !== node.constructor.title) successor.title = node.title;
  for (const mapping of input_mapping) {
    const { new_id, old_id } = mapping;
    const widget = successor.widgets?.find((entry) => entry.name === new_id);
    const value = valueFor(node, mapping);
    if (widget && value !== undefined) {
      widget.value = value;
      widget.callback?.(value);
    }
    moveInput(node.inputs.find((entry) => entry.name === old_id), successor, new_id);
  }
  for (const { old_idx, new_idx } of output_mapping) moveOutput(node.outputs[old_idx], successor, new_idx);
  graph.remove(node);
  graph.afterChange();
  app.canvas.selectItems?.([successor]);
}

/** Links are led over as they are, so that those from a subgraph's own inputs hold as well. */
function moveInput(input, successor, name) {
  const link = successor.graph.links.get(input?.link);
  const slot = successor.inputs.findIndex((entry) => entry.name === name);
  if (!link || slot < 0) return;
  Object.assign(link, { target_id: successor.id, target_slot: slot });
  successor.inputs[slot].link = link.id;
  input.link = null;
}

function moveOutput(output, successor, slot) {
  for (const id of output.links ?? []) {
    Object.assign(successor.graph.links.get(id), { origin_id: successor.id, origin_slot: slot });
  }
  successor.outputs[slot].links = output.links;
  output.links = null;
}
