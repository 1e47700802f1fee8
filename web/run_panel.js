/** On a sampler: presets, and what its last run took: time for each step, on a card the most memory, and notices. */

import { addPanel, after, element } from "./panel.js";
import { presetChoice } from "./presets.js";
import { sentenceBox } from "./text_panel.js";
import { say } from "./words.js";

const HEIGHT = 102;
const UNITS = ["B", "kB", "MB", "GB", "TB"];

/** @param {number} bytes @returns {string} such as "1.24 GB" (powers of 1000, three digits) */
export function memory(bytes) {
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), UNITS.length - 1);
  return `${Number((bytes / 1000 ** power).toPrecision(3))} ${UNITS[power]}`;
}

/** @param {number} seconds @returns {string} such as "0.312 s" or "48.1 ms" */
export function duration(seconds) {
  return seconds < 0.1 ? `${Number((seconds * 1000).toPrecision(3))} ms` : `${Number(seconds.toPrecision(3))} s`;
}

/** What a sampler has to say, in the language of the interface where its server sends more than the English. */
const noticesOf = (output) =>
  output?.cascade_notices?.map(([name, values]) => say(`notice.${name}`, values)) ?? output?.text;

/**
 * @param {object} node a sampler, just created
 */
export function addRunPanel(node) {
  const time = element("div", "cascade-panel-faint cascade-panel-sizes", [say("run.none")]);
  const space = element("div", "cascade-panel-faint cascade-panel-sizes");
  const notices = sentenceBox(2, "cascade-panel-warning");
  const content = element("div", "", [presetChoice(node), time, space, notices.box]);
  content.style.display = "contents";
  addPanel(node, "cascade_run", content, HEIGHT);

  after(node, "onExecuted", (output) => {
    notices.show(noticesOf(output) ?? []);
    const run = output?.cascade_run?.[0];
    if (!run) return;
    const { steps, seconds, peak_bytes, device } = run;
    time.textContent = say("run.time", {
      steps, step: duration(seconds / Math.max(steps, 1)), total: duration(seconds),
    });
    // 0 where the device does not measure a run's own memory, such as the CPU.
    space.textContent = peak_bytes ? say("run.memory", { peak: memory(peak_bytes), device }) : device;
    space.title = device;
  });
}
