/** Sentences in a node, such as what a LoRA's file holds: as many lines as there is room for, and all at a press. */

import { addPanel, after, element } from "./panel.js";
import { translateLine } from "./sentences.js";
import { say } from "./words.js";

const LINE = 1.35; // of the letters' size, as the panels have it

/**
 * Sentences in a room that stays as it is, however many they are. A press shows all of them over the graph.
 * @param {number} lines that it is high
 * @param {string} className
 * @returns {{box: HTMLElement, show: (sentences: string[]) => void}}
 */
export function sentenceBox(lines, className) {
  const first = element("span", className);
  first.style.webkitLineClamp = lines;
  const all = element("div", "cascade-panel-all");
  all.popover = "auto"; // above nodes and panels, whatever they cut off
  const button = element("button", "cascade-panel-text", [first]);
  button.style.minHeight = `${lines * LINE}em`;
  button.popoverTargetElement = all;
  all.addEventListener("toggle", () => {
    const { left, top } = button.getBoundingClientRect();
    all.style.left = `${Math.max(0, Math.min(left, window.innerWidth - all.offsetWidth))}px`;
    all.style.top = `${Math.max(0, Math.min(top, window.innerHeight - all.offsetHeight))}px`;
  });
  // The interface keeps this key from what the browser would do.
  button.addEventListener("keydown", ({ key }) => key === "Escape" && all.hidePopover());
  // Neither moves the node or the graph, but chooses words to copy and scrolls.
  for (const event of ["pointerdown", "wheel"]) all.addEventListener(event, (told) => told.stopPropagation());
  const show = (sentences) => {
    const text = sentences.join("\n");
    for (const place of [first, all]) place.textContent = text;
    button.title = text;
    button.style.visibility = text ? "" : "hidden";
    if (!text && all.matches(":popover-open")) all.hidePopover();
  };
  show([]);
  return { box: element("div", "", [button, all]), show };
}

/** @param {object} node one that returns sentences as `text` */
export function addTextPanel(node) {
  const { box, show } = sentenceBox(4, "cascade-panel-faint");
  addPanel(node, "cascade_text", box, 68);
  show([say("run.none")]);
  after(node, "onExecuted", (output) => output?.text && show(output.text.map(translateLine)));
}
