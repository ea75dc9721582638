// The page's messages, for visitors: what happened, and what to do. What operators want to know is in the console.

/** Something that cannot be shown; the message is for people. */
export class SourceError extends Error {}

export function fileProblem(file) {
  const kind = file.type ? ` (${file.type})` : "";
  return `“${file.name}”${kind} cannot be played by this browser: it has no picture, or a format that the browser does not support. Choose an MP4 (H.264) or WebM file.`;
}

export function imageProblem(file) {
  return `“${file.name}” is no picture that this browser can show. Choose a JPEG, PNG or WebP file.`;
}

export function clipProblem() {
  return "The sample clip could not be loaded. Try again in a moment, or choose a video.";
}

export function clipFormatProblem() {
  return "This browser cannot play the sample clip: it knows neither H.264 nor VP9. Use the camera, or ask about an image.";
}

export function openingProblem() {
  return "The browser could not show this. Try again, or choose something else.";
}

export function cameraProblem(name, message) {
  if (name === "insecure") {
    return "Browsers give the camera only to pages on this machine (localhost) or behind HTTPS. Open the page there, or choose a file.";
  }
  if (name === "NotAllowedError") return "The camera was not allowed. Allow it in the browser’s address bar, then try again.";
  if (name === "NotFoundError") return "No camera was found. Connect one, or choose a file.";
  return `The camera could not be started (${message || name}). Is another program using it?`;
}

/** Returns what happened where another camera could not be opened, and then not even the former one again. */
export function exchangeProblem(problem) {
  return `${problem} The camera from before could not be started again either: it is off, and its captions are kept.`;
}

export function screenProblem(name, message) {
  if (name === "NotAllowedError") return "The screen was not shared. Press Screen again to choose what to share.";
  return `The screen could not be shared (${message || name}).`;
}

export function placeProblem() {
  return "The browser did not allow another place for the video. It stays here.";
}

const KEPT = "Your captions are kept; this page tries again by itself.";
const TAKEN = "All places are taken right now. This page tries again by itself and gets the next free one.";
const SHUTTING_DOWN = `The server is being restarted. ${KEPT}`;
const FATAL = {
  too_many_sessions: TAKEN,
  slow_client: `Your connection was too slow for live captions. ${KEPT}`,
  engine_error: `The model has stopped. ${KEPT}`,
};
const CLOSED = {
  1001: SHUTTING_DOWN,
  1009: `A picture was too large to be sent. ${KEPT}`,
  1012: SHUTTING_DOWN,
};

/** Returns why a connection ended unasked; `error` is the server's last error event, or null. */
export function endProblem(error, code) {
  if (error) return FATAL[error.code] ?? error.message;
  return CLOSED[code] ?? `The connection was lost. ${KEPT}`;
}

/** Returns why no connection came about; `status` is that of a plain HTTP request, null without a response. */
export function connectProblem(status, hadKey) {
  if (status === 401) return hadKey ? "The server does not know this API key." : "This server asks for an API key.";
  if (status === null) return `The server cannot be reached. ${KEPT}`;
  return `The server takes no live sessions right now. ${KEPT}`;
}

/** Returns why a question about an image was not answered; `status` is HTTP's, null without a response. */
export function answerProblem(status, hadKey) {
  if (status === 401) return connectProblem(status, hadKey);
  if (status === null) return "The server cannot be reached. Ask again in a moment.";
  if (status === 429 || status >= 500) return "The server is busy. Ask again in a moment.";
  return "This question could not be answered. Ask a shorter one, or choose another image.";
}

/** Returns why a question is not sent now; what was typed stays. */
export function questionHint({ phase, source, stopping }) {
  if ((phase === "live" && !stopping) || phase === "image") return "One question at a time: the last one is being answered.";
  if (!source) return "Choose something to show first, then ask about it.";
  return phase === "stopped" || stopping ? "Reconnect first, then ask." : "There is no connection yet: ask again in a moment.";
}

/** Returns the statistics of a session as text, short enough for the top of the page; the figures have the rest. */
export function sessionSummary({ frames, captioned }) {
  return `Session ended: ${frames} ${frames === 1 ? "frame" : "frames"}, ${captioned} captioned`;
}
