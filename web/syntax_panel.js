/** Names syntax of other programs in a prompt, after the run that met it, and what to do instead. */

import { api } from "../../scripts/api.js";
import { addPanel, after, makeRoom } from "./panel.js";
import { sentenceBox } from "./text_panel.js";
import { say } from "./words.js";

const SENTENCES = {
  lora: "syntax.lora",
  break: "syntax.break",
  schedule: "syntax.schedule",
  choice: "syntax.choice",
};

/** @param {object} node one that returns [kind, piece of the prompt] as `cascade_syntax` where it met some */
export function addSyntaxPanel(node) {
  const { box, show } = sentenceBox(4, "cascade-panel-warning");
  let shown = false; // most prompts have none, and need no room for it
  const clear = () => show([]);
  api.addEventListener("execution_start", clear);
  after(node, "onRemoved", () => api.removeEventListener("execution_start", clear));
  after(node, "onExecuted", (output) => {
    if (!output?.cascade_syntax) return;
    if (!shown) {
      addPanel(node, "cascade_syntax", box, 68);
      makeRoom(node);
      shown = true;
    }
    show(output.cascade_syntax.map(([kind, piece]) => say(SENTENCES[kind], { text: piece })));
  });
}
