/** Plays scenarios in one page: a JSON of settings on standard input, a JSON of what was seen on its output. */

import { readFileSync } from "node:fs";
import { clear, withPage } from "./page.mjs";
import { SCENARIOS } from "./scenarios.mjs";

const settings = JSON.parse(readFileSync(0, "utf8"));

const seen = await withPage(settings, async (page, errors) => {
  const seen = {};
  for (const name of settings.scenarios ?? Object.keys(SCENARIOS)) {
    const began = Date.now();
    try {
      await clear(page);
      seen[name] = await SCENARIOS[name](page, settings);
    } catch (error) {
      seen[name] = { failed: error.stack };
      if (settings.pictures) await page.screenshot({ path: `${settings.pictures}/${name}.png` });
    }
    seen[name].seconds = (Date.now() - began) / 1000;
    seen[name].errors = errors.splice(0);
  }
  return seen;
});
console.log(JSON.stringify(seen));
