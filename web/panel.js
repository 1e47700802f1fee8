/** A piece of HTML in a node, below its widgets; it holds no value and is in no saved workflow. */

import { app } from "../../scripts/app.js";

const MARGIN = 10; // as wide as the widgets above

const STYLE = `
  .cascade-panel { box-sizing: border-box; width: 100%; overflow: hidden; display: flex;
    flex-direction: column; justify-content: center; gap: 4px; font: 12px/1.35 sans-serif;
    color: var(--input-text, #ddd); user-select: none; }
  .cascade-panel-row { display: flex; gap: 4px; align-items: center; }
  .cascade-panel select, .cascade-panel button { font: inherit; color: inherit; border-radius: 6px;
    border: 1px solid var(--border-color, #4e4e4e); background: var(--comfy-input-bg, #222);
    height: 24px; padding: 0 6px; cursor: pointer; }
  .cascade-panel button { flex: none; white-space: nowrap; }
  .cascade-panel select { flex: 1 1 0; min-width: 0; }
  .cascade-panel :disabled { opacity: 0.4; cursor: default; }
  .cascade-panel-sizes { font-variant-numeric: tabular-nums; white-space: nowrap; }
  .cascade-panel .cascade-panel-text { height: auto; padding: 0; border: none; background: none; text-align: left;
    white-space: normal; }
  .cascade-panel-text span { display: -webkit-box; -webkit-box-orient: vertical; overflow: hidden; }
  .cascade-panel-text span, .cascade-panel-all { overflow-wrap: anywhere; white-space: pre-line; }
  .cascade-panel-all { inset: auto; margin: 0; box-sizing: border-box; width: 380px; max-height: 60vh; overflow-y: auto;
    padding: 10px; border-radius: 6px; border: 1px solid var(--border-color, #4e4e4e); font: 13px/1.45 sans-serif;
    background: var(--comfy-menu-bg, #222); color: var(--input-text, #ddd); user-select: text; }
  .cascade-panel-faint { color: var(--descrip-text, #999); }
  .cascade-panel-warning { color: #e2a33c; }
`;

/**
 * An element with a class, text and children.
 * @param {string} tag
 * @param {string} [className]
 * @param {(Node | string)[]} [children]
 */
export function element(tag, className = "", children = []) {
  const made = document.createElement(tag);
  made.className = className;
  made.append(...children);
  return made;
}

/**
 * Puts an element into a node.
 * @param {object} node
 * @param {string} name of the widget, unique in its node
 * @param {HTMLElement} content
 * @param {number} height in pixels
 */
export function addPanel(node, name, content, height) {
  const style = element("style", "", [STYLE]);
  const panel = element("div", "cascade-panel", [style, content]);
  // Nodes 2.0 take `height` back, and a longer sentence would move the node.
  for (const bound of ["height", "minHeight", "maxHeight"]) panel.style[bound] = `${height}px`;
  const widget = node.addDOMWidget(name, "cascade_panel", panel, {
    serialize: false, // not sent to the server
    hideOnZoom: false,
    margin: MARGIN,
    getMinHeight: () => height + 2 * MARGIN,
    getMaxHeight: () => height + 2 * MARGIN,
    getValue: () => "",
    setValue: () => {},
  });
  widget.serialize = false; // not in the saved workflow: the values there are told apart by their places
  return widget;
}

/** Gives a node the room that a panel takes which it got after its creation, and has it drawn. @param {object} node */
export function makeRoom(node) {
  node.setSize?.([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  node.setDirtyCanvas?.(true, true); // older front ends show a panel once they draw
}

/**
 * Calls a function after whatever the node already calls on an event.
 * @param {object} target a node or a widget: this one alone, not its class
 * @param {string} event such as "onExecuted"
 * @param {(...values: any[]) => void} action
 */
export function after(target, event, action) {
  const before = target[event];
  target[event] = function (...values) {
    const result = before?.apply(this, values);
    action(...values);
    return result;
  };
}

/** @param {object} node @param {string} name of a widget of the node */
export const findWidget = (node, name) => node.widgets?.find((widget) => widget.name === name);

/** Whether a widget's value comes over a link, so that the widget itself says nothing. */
export const linked = (node, name) =>
  node.inputs?.some((input) => (input.widget?.name ?? input.name) === name && input.link != null);

/** @param {HTMLSelectElement} select @param {[string, string][]} entries values with their texts */
export function options(select, entries) {
  select.replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
}

/**
 * Sets a widget as a hand would.
 * @param {object} node
 * @param {string} name of a widget
 * @param {any} value
 */
export function setWidget(node, name, value) {
  const widget = findWidget(node, name);
  widget.value = value;
  widget.callback?.(value);
}

/**
 * Changes the graph as one step of undo. The canvas tells the interface of it: from the graph it hears of no change.
 * @param {() => void} change
 */
export function asOneChange(change) {
  app.canvas.emitBeforeChange();
  try {
    change();
  } finally {
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}
