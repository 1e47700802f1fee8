/** The pack's templates in the order of their numbers, with titles in the interface's language. */

import { api } from "../../scripts/api.js";
import { translated } from "./words.js";

const PACK = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2)); // its folder
const FILES = `/workflow_templates/${PACK}/`;

/** The server lists files as its disk does, and the interface shows them by their names. Call it once. */
export function arrangeTemplates() {
  const { getWorkflowTemplates, apiURL } = api;
  const names = new Map(); // of files, by title
  api.getWorkflowTemplates = async () => {
    const templates = await getWorkflowTemplates.call(api);
    const files = Array.isArray(templates?.[PACK]) ? templates[PACK].sort() : [];
    for (const name of files) names.set(translated(name), name);
    return names.size ? { ...templates, [PACK]: [...names.keys()] } : templates;
  };
  api.apiURL = (route) => {
    const own = typeof route === "string" && route.startsWith(FILES);
    const [title] = own ? route.slice(FILES.length).split(/(\.[a-z]+)$/) : [""];
    return apiURL.call(api, names.has(title) ? route.replace(title, names.get(title)) : route);
  };
}
