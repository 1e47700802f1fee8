/** Words under which our nodes are searched for, beside their names; from locales/<language>/main.json. */

import { say } from "./words.js";

/**
 * Adds them to the definitions that the search and the list of nodes show. Nodes on the canvas keep their names.
 * Versions whose search knows aliases get one more; 0.3.64 looks at names alone, and at no more than their first thirty
 * letters, which therefore hold what matters.
 * @param {object[]} definitions of all nodes, changed in place
 */
export function addSearchWords(definitions) {
  for (const [index, definition] of definitions.entries()) {
    const key = `search.${definition.name}`;
    const label = say(key, { name: definition.display_name });
    if (label === key) continue; // none of ours
    const aliases = definition.search_aliases;
    definitions[index] = {
      ...definition,
      ...(aliases ? { search_aliases: [...aliases, label] } : { display_name: label }),
    };
  }
}
