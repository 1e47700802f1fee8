/**
 * What sizes mean to Stable Cascade: mathematics only, the same as in nodes/sizes.py.
 *
 * @typedef {{width: number, height: number}} Size
 * @typedef {"trained" | "demo" | "few" | "many" | "long" | "compression" | "second" | "decoded"} Verdict
 */

export const COMPRESSION = 42.67; // published: 1024 pixels become 24 latent positions
const STAGE_B_COMPRESSION = 4;
const SIZE_STEP = 8;
const PRESET_STEP = 64;

// Stage C was trained on 24 × 24 and on other shapes of that area; 18² is 768 × 768, 30² is 1280 × 1280.
const TRAINED_SIDE = 24;
const LEAST_POSITIONS = 18 ** 2;
const MOST_POSITIONS = 30 ** 2;
const LONGEST_ASPECT = 6;
// Stage B was trained with Stage C latents of pictures between 1024 / 32 and 1024 / 64.
const LEAST_COMPRESSION = 32;
const MOST_COMPRESSION = 64;

const DEMO = { width: 256, height: 256 };
const MEGAPIXEL = 1024 ** 2;

/** Wide ones; swapping makes the tall ones. */
export const ASPECTS = ["1:1", "5:4", "4:3", "3:2", "16:9", "2:1", "21:9"];

/** Pictures of about so many megapixels, and the one size of the bundled demo cascade. */
export const AREAS = ["demo", "0.75", "1", "1.5", "2", "4"];

/** The same for a second, larger pass. */
export const LARGE_AREAS = ["1", "2", "4", "8", "16"];

/**
 * The Stage C latent of a picture.
 * @param {Size} size in pixels
 * @param {number} compression pixels for each position
 * @returns {Size} in positions
 */
export function stageCSize({ width, height }, compression) {
  return { width: Math.ceil(width / compression), height: Math.ceil(height / compression) };
}

/** @param {Size} size @returns {Size} the largest one within it whose sides are multiples of 8, at least 8 */
function wholeSize({ width, height }) {
  const whole = (side) => Math.max(Math.floor(side / SIZE_STEP), 1) * SIZE_STEP;
  return { width: whole(width), height: whole(height) };
}

/**
 * The Stage B latent of a picture; sides that are not multiples of 8 are cut down to one.
 * @param {Size} size in pixels
 * @returns {Size} in positions
 */
export function stageBSize(size) {
  const { width, height } = wholeSize(size);
  return { width: width / STAGE_B_COMPRESSION, height: height / STAGE_B_COMPRESSION };
}

/**
 * The size that a picture is brought to: as asked for, a side of 0 in the picture's own proportions.
 * @param {Size | null} own the picture's, null: not known
 * @param {Size} asked
 * @returns {Size | null} null where the picture's own would have to be known
 */
export function chosenSize(own, { width, height }) {
  if (width && height) return wholeSize({ width, height });
  if (!own || !(width || height)) return own;
  return wholeSize({
    width: width || Math.round((own.width * height) / own.height),
    height: height || Math.round((own.height * width) / own.width),
  });
}

/** @param {Size} size @param {number} scale @returns {Size} that of a picture made so many times wider and higher */
export function scaledSize({ width, height }, scale) {
  return wholeSize({ width: Math.round(width * scale), height: Math.round(height * scale) });
}

/** @param {string} aspect such as "16:9" @returns {number} width for each height */
export function aspectOf(aspect) {
  const [width, height] = aspect.split(":").map(Number);
  return width / height;
}

/**
 * The size of an aspect ratio and an area: sides are multiples of 64, as near to both as such sides can be.
 * @param {string} aspect one of ASPECTS
 * @param {string} area one of AREAS or LARGE_AREAS
 * @returns {Size} in pixels, never taller than wide
 */
export function presetSize(aspect, area) {
  if (area === "demo") return { ...DEMO };
  const ratio = aspectOf(aspect);
  const pixels = Number(area) * MEGAPIXEL;
  const distance = ({ width, height }) =>
    Math.abs(Math.log(width / height / ratio)) + Math.abs(Math.log((width * height) / pixels));
  const base = Math.sqrt(pixels / ratio) / PRESET_STEP;
  const heights = [Math.floor(base), Math.ceil(base)].map((steps) => Math.max(steps, 1) * PRESET_STEP);
  const candidates = heights.map((height) => {
    const width = Math.max(Math.round((height * ratio) / PRESET_STEP), 1) * PRESET_STEP;
    return { width, height };
  });
  return candidates.reduce((best, next) => (distance(next) < distance(best) ? next : best));
}

/**
 * The preset that a size is, standing or lying.
 * @param {Size} size
 * @param {string[]} areas AREAS or LARGE_AREAS
 * @returns {{aspect: string, area: string} | null}
 */
export function presetOf({ width, height }, areas) {
  const [long, short] = [Math.max(width, height), Math.min(width, height)];
  for (const area of areas) {
    for (const aspect of area === "demo" ? ["1:1"] : ASPECTS) {
      const preset = presetSize(aspect, area);
      if (preset.width === long && preset.height === short) return { aspect, area };
    }
  }
  return null;
}

/**
 * Whether the networks know such a size, and if not, why.
 * @param {Size} size in pixels
 * @param {number} compression
 * @returns {Verdict}
 */
export function verdict(size, compression) {
  if (size.width === DEMO.width && size.height === DEMO.height && compression === COMPRESSION) return "demo";
  const aspect = size.width / size.height;
  if (Math.max(aspect, 1 / aspect) > LONGEST_ASPECT) return "long";
  if (compression < LEAST_COMPRESSION || compression > MOST_COMPRESSION) return "compression";
  const { width, height } = stageCSize(size, compression);
  if (width * height < LEAST_POSITIONS) return "few";
  if (width * height > MOST_POSITIONS) return "many";
  return "trained";
}

/**
 * The same for the latent of a first pass that is enlarged: Stage B has to know it, Stage C has composed it already.
 * @param {Size} size in pixels
 * @param {number} compression
 * @returns {Verdict}
 */
export function secondVerdict(size, compression) {
  return compression < LEAST_COMPRESSION || compression > MOST_COMPRESSION ? "compression" : "second";
}

/**
 * The same for a latent that Stage C does not work on, such as a finished picture's that Stage B makes anew.
 * @param {Size} size in pixels
 * @param {number} compression
 * @returns {Verdict}
 */
export function decodedVerdict(size, compression) {
  return secondVerdict(size, compression) === "second" ? "decoded" : "compression";
}

/**
 * The compression that brings Stage C nearest to its trained area, among those Stage B was trained on.
 * @param {Size} size in pixels
 * @returns {number} with two decimals, rounded up: a hundredth less would add a row
 */
export function fittingCompression({ width, height }) {
  if (width === DEMO.width && height === DEMO.height) return COMPRESSION;
  const exact = Math.sqrt(width * height) / TRAINED_SIDE;
  const rounded = Math.ceil(exact * 100 - 1e-6) / 100;
  return Math.min(Math.max(rounded, LEAST_COMPRESSION), MOST_COMPRESSION);
}
