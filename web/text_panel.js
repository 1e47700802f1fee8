/** What a node says after its run, such as what a LoRA's file holds. */

import { addPanel, after, element } from "./panel.js";
import { say } from "./words.js";

const HEIGHT = 68; // four lines

/**
 * @param {object} node one that returns sentences as `text`
 * @returns {(sentences: string[]) => void} shows others
 */
export function addTextPanel(node) {
  const text = element("div", "cascade-panel-faint cascade-panel-text", [say("run.none")]);
  addPanel(node, "cascade_text", text, HEIGHT);

  const show = (sentences) => {
    text.textContent = sentences.join(" ");
  };
  after(node, "onExecuted", (output) => {
    if (output?.text) show(output.text);
  });
  return show;
}
