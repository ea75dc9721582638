// Sources of frames, each put into a <video>: the sample clip, a file, the screen; cameras are in cameras.js.

import { address } from "./live_client.js";
import { SourceError, clipFormatProblem, clipProblem, fileProblem, screenProblem } from "./messages.js";
import { fetchWithin } from "./silence.js";

const MAX_WAIT_MS = 15_000;
// The sample clip in each format that it comes in, the first one that a browser plays; nearly all play both.
const CLIPS = [
  { name: "digits.mp4", type: 'video/mp4; codecs="avc1.64001f"' },
  { name: "digits.webm", type: 'video/webm; codecs="vp9"' },
];

const KINDS = {
  file: { hasVideo: true, canSeek: true, isStream: false },
  camera: { hasVideo: true, canSeek: false, isStream: true },
  screen: { hasVideo: true, canSeek: false, isStream: true },
  image: { hasVideo: false, canSeek: false, isStream: false },
};

/**
 * Describes something to show. @param {string} name for people @param {"file" | "camera" | "screen" | "image"} kind
 * @returns {{name: string, kind: string, hasVideo: boolean, canSeek: boolean, isStream: boolean}}
 */
export function describe(name, kind) {
  return { name, kind, ...KINDS[kind] };
}

/**
 * What was opened, not shown yet.
 * @typedef {{show: (video: HTMLVideoElement) => Promise<void>, drop: () => void, stream?: MediaStream}} Opened `show`
 *   puts it into a video, `drop` releases it instead; only a camera or a screen has a stream
 */

/** Opens a file; rejects with an error message if it cannot be played. @returns {Promise<Opened>} */
export async function openFile(file) {
  const url = URL.createObjectURL(file);
  const trial = document.createElement("video");
  await loaded(trial, () => (trial.src = url)).catch(() => undefined);
  const hasPicture = trial.videoWidth > 0;
  empty(trial);
  if (!hasPicture) {
    URL.revokeObjectURL(url);
    throw new SourceError(fileProblem(file));
  }
  return { show: (video) => loaded(video, () => (video.src = url)), drop: () => URL.revokeObjectURL(url) };
}

/** Opens the clip that comes with the page, in the first format that this browser plays. */
export async function openClip() {
  const trial = document.createElement("video");
  for (const { name, type } of CLIPS.filter((clip) => trial.canPlayType(clip.type))) {
    const clip = await fetchWithin(MAX_WAIT_MS, address(`web/${name}`), {}, (answer) => (answer.ok ? answer.blob() : null));
    if (clip === null) throw new SourceError(clipProblem());
    const opened = await openFile(new File([clip], name, { type })).catch(() => null);
    if (opened) return opened;
  }
  throw new SourceError(clipFormatProblem());
}

/** Whether this browser shares screens; phones do not. */
export function canShareScreen() {
  return Boolean(navigator.mediaDevices?.getDisplayMedia);
}

/** Opens a screen, window or tab that the user chooses. */
export function openScreen() {
  return openStream(() => navigator.mediaDevices.getDisplayMedia({ video: { frameRate: { ideal: 15 } } }), screenProblem);
}

/** Empties the video and releases the file, the camera or the screen. */
export function closeSource(video) {
  stopTracks(video.srcObject);
  if (video.src) URL.revokeObjectURL(video.src);
  video.srcObject = null;
  empty(video);
}

function empty(video) {
  video.removeAttribute("src");
  video.load();
}

function stopTracks(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

/** Opens a camera or a screen by the browser's own call; `problem` words its errors. @returns {Promise<Opened>} */
export async function openStream(open, problem) {
  let stream;
  try {
    stream = await open();
  } catch (error) {
    throw new SourceError(problem(error.name, error.message));
  }
  return { stream, show: (video) => loaded(video, () => (video.srcObject = stream)), drop: () => stopTracks(stream) };
}

/** Waits until a video knows its size. Not for a picture: phones load none before it plays. */
async function loaded(video, open) {
  const waiting = new AbortController();
  const { signal } = waiting;
  try {
    await new Promise((resolve, reject) => {
      video.addEventListener("loadedmetadata", resolve, { signal });
      video.addEventListener("error", reject, { signal });
      const timer = setTimeout(reject, MAX_WAIT_MS);
      signal.addEventListener("abort", () => clearTimeout(timer));
      open();
    });
  } finally {
    waiting.abort();
  }
}
