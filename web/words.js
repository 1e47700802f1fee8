/** The words of the panels, in the language of the interface; from locales/<language>/main.json. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** @type {Record<string, Record<string, string>>} */
let words = {};

/** @type {Map<string, string>} from texts of the examples, in any language, to the interface's */
const examples = new Map();

/** Fetches them. Before it has, and where a language lacks one, a word is its own key. */
export async function loadWords() {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const languages = await api.getCustomNodesI18n();
  const chosen = languages[locale] ?? languages[locale.split("-")[0]];
  words = chosen?.cascadeNodes ?? languages.en?.cascadeNodes ?? {};
  for (const { cascadeNodes } of Object.values(languages)) {
    for (const [name, text] of Object.entries(cascadeNodes?.example ?? {})) {
      examples.set(text, words.example?.[name] ?? text);
    }
  }
}

/** @param {string} text any @returns {string} an example's in the language of the interface, all others as they are */
export const translated = (text) => examples.get(text) ?? text;

/**
 * @param {string} key such as "size.swap"
 * @param {Record<string, string | number>} [values] for the {names} in it
 * @returns {string}
 */
export function say(key, values = {}) {
  const [group, name] = key.split(".");
  const text = words[group]?.[name] ?? key;
  return text.replace(/\{(\w+)\}/g, (whole, name) => String(values[name] ?? whole));
}
