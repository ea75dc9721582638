// Sources of frames: the sample clip, a file, a camera or the screen, each put into a <video>.

import { address } from "./live_client.js";
import { SourceError, cameraProblem, clipFormatProblem, clipProblem, fileProblem, screenProblem } from "./messages.js";

/**
 * What was opened, not shown yet.
 * @typedef {{show: (video: HTMLVideoElement) => Promise<void>, drop: () => void}} Opened `show` puts it into a video,
 *   `drop` releases it instead
 */

/** Opens a file; rejects with an error message if it cannot be played. @returns {Promise<Opened>} */
export async function openFile(file) {
  const url = URL.createObjectURL(file);
  const trial = document.createElement("video");
  await loaded(trial, () => (trial.src = url)).catch(() => undefined);
  if (!trial.videoWidth) {
    URL.revokeObjectURL(url);
    throw new SourceError(fileProblem(file));
  }
  return { show: (video) => loaded(video, () => (video.src = url)), drop: () => URL.revokeObjectURL(url) };
}

/** Opens the clip that comes with the page. */
export async function openClip() {
  const answer = await fetch(address("web/digits.mp4")).catch(() => null);
  if (!answer?.ok) throw new SourceError(clipProblem());
  try {
    return await openFile(new File([await answer.blob()], "digits.mp4", { type: "video/mp4" }));
  } catch {
    throw new SourceError(clipFormatProblem());
  }
}

/** Opens a camera, the browser's own choice with ""; rejects with an error message if it may not be used. */
export async function openCamera(deviceId = "") {
  if (!navigator.mediaDevices) throw new SourceError(cameraProblem("insecure"));
  const device = deviceId ? { deviceId: { exact: deviceId } } : { facingMode: "environment" };
  return openStream(() => navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 }, ...device } }), cameraProblem);
}

/** Whether this browser shares screens; phones do not. */
export function canShareScreen() {
  return Boolean(navigator.mediaDevices?.getDisplayMedia);
}

/** Opens a screen, window or tab that the user chooses. */
export function openScreen() {
  return openStream(() => navigator.mediaDevices.getDisplayMedia({ video: { frameRate: { ideal: 15 } } }), screenProblem);
}

/** Returns the cameras as {id, name}; their names are known once one was allowed. */
export async function listCameras() {
  const devices = await navigator.mediaDevices.enumerateDevices();
  const cameras = devices.filter(({ kind }) => kind === "videoinput");
  return cameras.map(({ deviceId, label }, index) => ({ id: deviceId, name: label || `Camera ${index + 1}` }));
}

/** Empties the video and releases the file, the camera or the screen. */
export function closeSource(video) {
  stopTracks(video.srcObject);
  if (video.src) URL.revokeObjectURL(video.src);
  video.srcObject = null;
  video.removeAttribute("src");
  video.load();
}

function stopTracks(stream) {
  for (const track of stream?.getTracks() ?? []) track.stop();
}

async function openStream(open, problem) {
  let stream;
  try {
    stream = await open();
  } catch (error) {
    throw new SourceError(problem(error.name, error.message));
  }
  return { show: (video) => loaded(video, () => (video.srcObject = stream)), drop: () => stopTracks(stream) };
}

function loaded(video, open) {
  return new Promise((resolve, reject) => {
    video.addEventListener("loadeddata", resolve, { once: true });
    video.addEventListener("error", reject, { once: true });
    open();
  });
}
