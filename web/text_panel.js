/** What a node says after its run, such as what a LoRA's file holds. */

import { addPanel, after, element } from "./panel.js";
import { translateLine } from "./sentences.js";
import { say } from "./words.js";

const HEIGHT = 68; // four lines

/**
 * @param {object} node
 * @param {(output: object) => string[] | undefined} sentencesOf what the node returned; by default its `text`
 * @returns {(sentences: string[]) => void} shows others
 */
export function addTextPanel(node, sentencesOf = (output) => output?.text?.map(translateLine)) {
  const text = element("div", "cascade-panel-faint cascade-panel-text", [say("run.none")]);
  addPanel(node, "cascade_text", text, HEIGHT);

  const show = (sentences) => {
    text.textContent = sentences.join("\n");
  };
  after(node, "onExecuted", (output) => {
    const sentences = sentencesOf(output);
    if (sentences) show(sentences);
  });
  return show;
}
