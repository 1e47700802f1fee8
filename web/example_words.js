/** Notes and titles of groups of the example graphs, whose files hold them in English, in the interface's language. */

import { app } from "../../scripts/app.js";
import { translated } from "./words.js";

const NOTES = new Set(["MarkdownNote", "Note"]);

/** Translates those of the graph that was just loaded which are an example's to the letter, and no others. */
export function translateExample() {
  const { graph } = app;
  for (const group of graph._groups ?? []) group.title = translated(group.title);
  for (const node of graph._nodes ?? []) {
    const text = NOTES.has(node.type) && node.widgets?.[0];
    if (text) text.value = translated(text.value);
  }
}
