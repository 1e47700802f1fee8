/**
 * What nodes say in English, in errors and in panels, in the interface's language, from sentences/<language>.json: there
 * `{}` stands for a value, in a translation {1} for the first. What is not in it stays English.
 */

import { api } from "../../scripts/api.js";
import { language, nodeName } from "./words.js";

const ERROR = "CascadeError";
const SEPARATOR = /(, | and |; )(?![^()]*\))/; // of listed values, not of those in brackets

/** @typedef {{pieces: string[], translation: string}} Pattern */
/** @type {Pattern[]} */
let sentences = [];
/** @type {Pattern[]} what a panel shows without a verb */
let lines = [];
/** @type {Pattern[]} values within these, and what they are made of */
let parts = [];

/** Longest first: of two that fit, the one that says more. */
function patternsOf(table) {
  const patterns = Object.entries(table).map(([english, translation]) => ({ pieces: english.split("{}"), translation }));
  const length = ({ pieces }) => pieces.join("").length;
  return patterns.sort((one, other) => length(other) - length(one));
}

/** Fetches them. Call it after loadWords. */
export async function loadSentences() {
  const chosen = language();
  if (chosen !== "ja" && chosen !== "zh") return;
  const answer = await fetch(new URL(`sentences/${chosen}.json`, import.meta.url));
  const tables = await answer.json();
  [sentences, lines, parts] = [tables.sentences, tables.lines, tables.parts].map(patternsOf);
}

/** Translates errors and notices. Call it as early as can be: the interface shows an error when its own turn comes. */
export function listen() {
  api.addEventListener("execution_error", ({ detail }) => {
    if (!detail.exception_type?.endsWith(ERROR)) return;
    detail.exception_message = withEnglish(detail.exception_message.trim());
  });
  api.addEventListener("progress_text", ({ detail }) => {
    const text = translateSentence(detail.text);
    if (text === detail.text) return; // such as a translation
    // Told once more after the English, which the interface may show before or after its turn comes here.
    queueMicrotask(() => api.dispatchCustomEvent("progress_text", { ...detail, text }));
  });
  translateRefusals();
}

/** Of a prompt that the server refuses no event tells: the interface shows what queuePrompt returns or throws. */
function translateRefusals() {
  const { queuePrompt } = api;
  api.queuePrompt = async (...values) => {
    try {
      const answer = await queuePrompt.apply(api, values);
      translateNodeErrors(answer?.node_errors);
      return answer;
    } catch (error) {
      translateNodeErrors(error?.response?.node_errors);
      throw error;
    }
  };
}

/** @param {Record<string, {errors: {details: string}[]}>} [nodeErrors] changed in place */
function translateNodeErrors(nodeErrors) {
  for (const { errors } of Object.values(nodeErrors ?? {})) {
    for (const error of errors) {
      const [input, ...sentence] = error.details.split(" - "); // what ComfyUI puts before it
      if (sentence.length) error.details = `${input} - ${withEnglish(sentence.join(" - "))}`;
    }
  }
}

/** The values of a text that a pattern fits, each as far as the pattern's next words; null where it does not fit. */
function valuesIn(text, { pieces }) {
  const [first, ...rest] = pieces;
  if (!text.startsWith(first)) return null;
  let place = first.length;
  const values = [];
  for (const [index, piece] of rest.entries()) {
    const end = index === rest.length - 1 ? text.length - piece.length : text.indexOf(piece, place);
    if (end < place || !text.startsWith(piece, end)) return null;
    values.push(text.slice(place, end));
    place = end + piece.length;
  }
  return place === text.length ? values : null;
}

/** A text by the first pattern that fits; null by none. */
function translateBy(patterns, text) {
  for (const pattern of patterns) {
    const values = valuesIn(text, pattern);
    if (values) return pattern.translation.replace(/\{(\d)\}/g, (_, place) => translatePart(values[place - 1]));
  }
  return null;
}

/** A value, or each of several: names of nodes and what else is known, all others as they are. */
function translatePart(text) {
  const pieces = text.split(SEPARATOR);
  const several = pieces.map((piece, index) => (index % 2 ? null : knownPart(piece)));
  const all = pieces.length > 1 && several.every((translation, index) => index % 2 || translation !== null);
  const whole = all ? null : knownPart(text);
  if (whole !== null) return whole;
  return pieces.map((piece, index) => {
    if (index % 2 === 0) return several[index] ?? piece;
    // What joins names as they are stays: it may be part of one.
    return several[index - 1] === null && several[index + 1] === null ? piece : "、";
  }).join("");
}

const knownPart = (text) => nodeName(text) ?? translateBy(parts, text);

/** @param {string} text a sentence, or several @returns {string} */
export function translateSentence(text) {
  const single = text.split(/(?<=\.) (?=[A-Z])/).map((sentence) => translateBy(sentences, sentence));
  if (single.every((sentence) => sentence !== null)) return single.join("");
  return translateBy(sentences, text) ?? text;
}

/** @param {string} text what a node says of its file, which may be less than a sentence @returns {string} */
export const translateLine = (text) => {
  const sentence = translateSentence(text);
  return sentence === text ? (translateBy(lines, text) ?? text) : sentence;
};

/** An error with its English below, by which it is found in the help, in the log and by those who are asked. */
function withEnglish(text) {
  const translation = translateSentence(text);
  return translation === text ? text : `${translation}\n${text}`;
}
