/** Names syntax of other programs in a prompt, after the run that met it, and what to do instead. */

import { api } from "../../scripts/api.js";
import { addPanel, after, element, makeRoom } from "./panel.js";
import { say } from "./words.js";

const HEIGHT = 68; // four lines
const SENTENCES = {
  lora: "syntax.lora",
  break: "syntax.break",
  schedule: "syntax.schedule",
  choice: "syntax.choice",
};

/** @param {object} node one that returns [kind, piece of the prompt] as `cascade_syntax` where it met some */
export function addSyntaxPanel(node) {
  const text = element("div", "cascade-panel-warning cascade-panel-text");
  let shown = false; // most prompts have none, and need no room for it
  api.addEventListener("execution_start", () => (text.textContent = ""));
  after(node, "onExecuted", (output) => {
    if (!output?.cascade_syntax) return;
    if (!shown) {
      addPanel(node, "cascade_syntax", text, HEIGHT);
      makeRoom(node);
      shown = true;
    }
    text.textContent = output.cascade_syntax.map(([kind, piece]) => say(SENTENCES[kind], { text: piece })).join("\n");
  });
}
