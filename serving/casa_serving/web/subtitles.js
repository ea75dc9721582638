// Captions as subtitle files, by the rules of casa-caption: each stands until the next one, at most MAX_CAPTION_S.

const MAX_CAPTION_S = 10;
// Characters with a meaning in one of the formats; captions are plain text.
const HARMLESS = { "{": "(", "}": ")", "<": "\u2039", ">": "\u203a", "\\": "/" };

/** Returns SubRip. @param {{timestamp: number, text: string}[]} captions by time @param {number} endS the video's end, not finite if unknown */
export function toSrt(captions, endS) {
  const blocks = timed(captions, endS).map(({ start, end, text }, index) => `${index + 1}\n${span(start, end, ",")}\n${text}\n`);
  return blocks.join("\n");
}

/** Returns WebVTT; see `toSrt`. */
export function toVtt(captions, endS) {
  const blocks = timed(captions, endS).map(({ start, end, text }) => `${span(start, end, ".")}\n${text.replaceAll("&", "&amp;")}\n`);
  return ["WEBVTT\n", ...blocks].join("\n");
}

function timed(captions, endS) {
  const end = Number.isFinite(endS) ? endS : Infinity; // A camera that is off has no duration.
  return captions.map(({ timestamp, text }, index) => ({
    start: timestamp,
    end: Math.min(captions[index + 1]?.timestamp ?? Math.max(end, timestamp), timestamp + MAX_CAPTION_S),
    text: text.trim().replace(/[{}<>\\]/g, (character) => HARMLESS[character]).replace(/\s+/g, " "),
  }));
}

function span(start, end, point) {
  return `${stamp(start, point)} --> ${stamp(end, point)}`;
}

/** Returns seconds as hh:mm:ss and milliseconds after `point`. */
function stamp(seconds, point) {
  const ms = Math.round(seconds * 1000);
  const parts = [Math.floor(ms / 3_600_000), Math.floor(ms / 60_000) % 60, Math.floor(ms / 1000) % 60];
  return `${parts.map((part) => String(part).padStart(2, "0")).join(":")}${point}${String(ms % 1000).padStart(3, "0")}`;
}

/** Has the browser save a text as a file. */
export function save(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000); // Browsers read it after the click.
}
