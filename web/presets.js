/** Settings of both samplers that belong together, from presets.json: chosen on one, set on both as one step of undo. */

import { after, asOneChange, element, findWidget, options, setWidget } from "./panel.js";
import { say } from "./words.js";

const CUSTOM = "";

/** @type {Record<string, Record<string, Record<string, number | string>>>} by name and class of the node */
let presets = {};

export async function loadPresets() {
  const answer = await fetch(new URL("presets.json", import.meta.url));
  presets = await answer.json();
}

const isSampler = (node) => node.comfyClass in presets.published;

const findInput = (node, name) => node.inputs?.find((input) => (input.widget?.name ?? input.name) === name);
const linkOf = (node, input) => (input?.link == null ? null : node.graph.links.get(input.link));

/** Whether a link's end is the border of the subgraph that it lies in. @param {"origin" | "target"} side */
const atBorder = (graph, link, side) =>
  graph.inputNode && String(link[`${side}_id`]) === String((side === "origin" ? graph.inputNode : graph.outputNode).id);

/** The boxes that a subgraph is shown as, in all graphs. */
function boxesOf(subgraph) {
  const { rootGraph } = subgraph;
  const graphs = [rootGraph, ...rootGraph.subgraphs.values()];
  return graphs.flatMap((graph) => graph.nodes.filter((node) => node.subgraph === subgraph));
}

const linksAt = (graph, ids) => (ids ?? []).map((id) => graph.links.get(id)).filter(Boolean);
const linksFrom = (node, slot) => linksAt(node.graph, node.outputs[slot]?.links);
const linksInto = (node, slot) => linksAt(node.graph, [node.inputs[slot]?.link]);

/**
 * The nodes that links end at on one side, also within a box or outside of the subgraph that they lie in.
 * @param {"origin" | "target"} side
 * @param {Set<object>} seen links, so that none is followed twice
 */
function nodesAt(graph, links, side, seen) {
  return links.flatMap((link) => {
    if (seen.has(link)) return [];
    seen.add(link);
    const slot = link[`${side}_slot`];
    if (atBorder(graph, link, side)) {
      const onward = side === "target" ? linksFrom : linksInto;
      return boxesOf(graph).flatMap((box) => nodesAt(box.graph, onward(box, slot), side, seen));
    }
    const node = graph.getNodeById(link[`${side}_id`]);
    if (!node?.subgraph) return node ? [node] : [];
    const { subgraph } = node;
    const inner = (side === "target" ? subgraph.inputs : subgraph.outputs)[slot];
    return nodesAt(subgraph, linksAt(subgraph, inner?.linkIds), side, seen);
  });
}

/**
 * The samplers that work on the same picture as one: those that its stage_c leads to, or comes from, with no other
 * sampler between. A second pass is thus left as it is.
 */
function partners(node) {
  const seen = new Set();
  const onward = (from) =>
    (from.outputs ?? []).flatMap((_, slot) => nodesAt(from.graph, linksFrom(from, slot), "target", seen));
  const back = (from) =>
    (from.inputs ?? []).flatMap((_, slot) => nodesAt(from.graph, linksInto(from, slot), "origin", seen));
  const stageC = node.inputs.findIndex((input) => input.name === "stage_c");
  const follow = stageC < 0 ? onward : back;
  const waiting = stageC < 0 ? onward(node) : nodesAt(node.graph, linksInto(node, stageC), "origin", seen);
  const found = new Set();
  while (waiting.length) {
    const next = waiting.pop();
    if (!isSampler(next)) waiting.push(...follow(next));
    else if (next.comfyClass !== node.comfyClass) found.add(next);
  }
  return [...found];
}

/** Where a widget's value is set: on the node itself, or on the boxes that it was led out to; nowhere on another's link. */
function placesOf(node, name) {
  const link = linkOf(node, findInput(node, name));
  if (!link) return findWidget(node, name) ? [[node, name]] : [];
  if (!atBorder(node.graph, link, "origin")) return [];
  return boxesOf(node.graph).flatMap((box) => {
    const input = box.inputs[link.origin_slot];
    return placesOf(box, input.widget?.name ?? input.name);
  });
}

/** Whether a sampler has a preset's values. */
const has = (node, preset) =>
  Object.entries(preset[node.comfyClass]).every(([name, value]) => {
    const [[place, at]] = [...placesOf(node, name), [node, name]];
    return findWidget(place, at).value === value;
  });

/** Sets samplers as one step of undo. */
function apply(preset, samplers) {
  asOneChange(() => {
    for (const sampler of samplers) {
      for (const [name, value] of Object.entries(preset[sampler.comfyClass])) {
        for (const [place, at] of placesOf(sampler, name)) setWidget(place, at, value);
      }
    }
  });
}

/** The samplers in a box and in the boxes within it. */
function samplersIn({ nodes }) {
  return nodes.flatMap((node) => (node.subgraph ? samplersIn(node.subgraph) : isSampler(node) ? [node] : []));
}

/** In the menu of a box that holds samplers: presets, which set them and those of the same picture outside. */
export function offerPresets(node) {
  if (!node.subgraph) return;
  after(node, "getExtraMenuOptions", (_canvas, menu) => {
    const samplers = samplersIn(node.subgraph);
    if (!samplers.length) return;
    const all = () => new Set(samplers.flatMap((sampler) => [sampler, ...partners(sampler)]));
    const choices = Object.entries(presets).map(([name, preset]) => ({
      content: say(`preset.${name}`), callback: () => apply(preset, all()),
    }));
    menu.push({ content: say("preset.menu"), has_submenu: true, submenu: { options: choices } });
  });
}

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
    if (preset) apply(preset, [node, ...partners(node)]);
    show();
  });
  for (const widget of node.widgets) after(widget, "callback", show);
  after(node, "onConfigure", show);
  show();
  return element("div", "cascade-panel-row", [choice]);
}
