// Sources of frames: a file or the camera in a <video>, and its frames as small image files.

import { SourceError, cameraProblem, fileProblem } from "./messages.js";

// The server shrinks pictures to what the model sees; more than this only costs time on the way.
const MAX_SIDE = 640;
const TYPE = "image/webp";
const QUALITY = 0.95;

/**
 * Opens a file; rejects with an error message if it cannot be played.
 * @returns a function that puts it into a video
 */
export async function openFile(file) {
  const url = URL.createObjectURL(file);
  const trial = document.createElement("video");
  await loaded(trial, () => (trial.src = url)).catch(() => undefined);
  if (!trial.videoWidth) {
    URL.revokeObjectURL(url);
    throw new SourceError(fileProblem(file));
  }
  return (video) => loaded(video, () => (video.src = url));
}

/**
 * Opens the camera; rejects with an error message if there is none or it may not be used.
 * @returns a function that puts it into a video
 */
export async function openCamera() {
  if (!navigator.mediaDevices) throw new SourceError(cameraProblem("insecure"));
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } }, audio: false });
    return (video) => loaded(video, () => (video.srcObject = stream));
  } catch (error) {
    throw new SourceError(cameraProblem(error.name, error.message));
  }
}

/** Empties the video and releases the file or the camera. */
export function closeSource(video) {
  for (const track of video.srcObject?.getTracks() ?? []) track.stop();
  if (video.src) URL.revokeObjectURL(video.src);
  video.srcObject = null;
  video.removeAttribute("src");
  video.load();
}

/** Starts to play; a browser that forbids sound without a click plays silently. */
export async function play(video) {
  try {
    await video.play();
  } catch (error) {
    if (error.name !== "NotAllowedError") return; // Paused again or closed meanwhile.
    video.muted = true;
    await video.play().catch(() => undefined);
  }
}

/** Calls `onFrame(time)` for every frame that the video shows, for as long as the page lives. */
export function watchFrames(video, onFrame) {
  const next = (_, { mediaTime }) => {
    onFrame(mediaTime);
    video.requestVideoFrameCallback(next);
  };
  video.requestVideoFrameCallback(next);
}

/**
 * Returns the picture that the video shows now as an image file.
 * @param {HTMLVideoElement} video
 * @param {HTMLCanvasElement} canvas
 * @param {{max_frame_side: number, max_frame_pixels: number}} limits the server's
 */
export function takePicture(video, canvas, limits) {
  const side = Math.min(MAX_SIDE, limits.max_frame_side, Math.floor(Math.sqrt(limits.max_frame_pixels)));
  const scale = Math.min(1, side / Math.max(video.videoWidth, video.videoHeight));
  canvas.width = Math.max(1, Math.round(video.videoWidth * scale));
  canvas.height = Math.max(1, Math.round(video.videoHeight * scale));
  canvas.getContext("2d").drawImage(video, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => canvas.toBlob(resolve, TYPE, QUALITY));
}

function loaded(video, open) {
  return new Promise((resolve, reject) => {
    video.addEventListener("loadeddata", resolve, { once: true });
    video.addEventListener("error", reject, { once: true });
    open();
  });
}
