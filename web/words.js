/** The words of the panels, in the language of the interface; from locales/<language>/main.json. */

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

/** @type {Record<string, Record<string, string>>} */
let words = {};

/** Fetches them. Before it has, and where a language lacks one, a word is its own key. */
export async function loadWords() {
  const locale = app.extensionManager.setting.get("Comfy.Locale") ?? "en";
  const languages = await api.getCustomNodesI18n();
  const chosen = languages[locale] ?? languages[locale.split("-")[0]];
  words = chosen?.cascadeNodes ?? languages.en?.cascadeNodes ?? {};
}

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
