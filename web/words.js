/** The words of the panels, in the language of the interface; from locales/<language>/main.json. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** @type {Record<string, Record<string, string>>} */
let words = {};

/** @type {Map<string, string>} from texts of the examples, in any language, to the interface's */
const examples = new Map();

/** @type {Map<string, string>} from the nodes' English names */
const nodeNames = new Map();

/** @returns {string} the interface's, without a country: "zh" of "zh-TW" */
export const language = () => (app.extensionManager.setting.get("Comfy.Locale") ?? "en").split("-")[0];

/** Fetches them. Before it has, and where a language lacks one, a word is its own key. */
export async function loadWords() {
  const languages = await api.getCustomNodesI18n();
  const chosen = languages[app.extensionManager.setting.get("Comfy.Locale")] ?? languages[language()];
  words = chosen?.cascadeNodes ?? languages.en?.cascadeNodes ?? {};
  for (const [name, { display_name }] of Object.entries(languages.en?.nodeDefs ?? {})) {
    nodeNames.set(display_name, chosen?.nodeDefs?.[name]?.display_name ?? display_name);
  }
  for (const { cascadeNodes } of Object.values(languages)) {
    for (const [name, text] of Object.entries(cascadeNodes?.example ?? {})) {
      examples.set(text, words.example?.[name] ?? text);
    }
  }
}

/** @param {string} english @returns {string | null} a node's name as the interface shows it; null for anything else */
export const nodeName = (english) => nodeNames.get(english) ?? null;

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
