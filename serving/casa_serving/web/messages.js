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
const LOST = `The connection was lost. ${KEPT}`;
const TAKEN = "All places are taken right now. This page tries again by itself and gets the next free one.";
const SHUTTING_DOWN = `The server is being restarted. ${KEPT}`;
// By the server's own codes. Its words are for operators.
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
const REJECTED = {
  bad_message: "The server does not take this question. Ask a shorter one, in plain words.",
  bad_frame: "The server could not read one of the pictures. It goes on with the next one.",
  frame_too_large: "One of the pictures was too large for the server. It goes on with the next one.",
};

/** Returns why a connection ended unasked; `error` is the code of the server's last error event, if there was one. */
export function endProblem(error, code) {
  return FATAL[error] ?? CLOSED[code] ?? LOST;
}

/** Returns what a session did not take, by the code of the server's error event. */
export function rejectionProblem(code) {
  return REJECTED[code] ?? "The server did not take what this page has sent. It goes on all the same.";
}

/** Returns that the server does not take the settings; `names` are those that it complains about, if it says so. */
export function settingsProblem(names) {
  const which = names.length ? `: ${names.join("; ")}` : "";
  return `The server does not take these settings${which}. Change them below the video, then press Apply.`;
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
export function questionHint({ phase, source, stopping, needsKey }) {
  if ((phase === "live" && !stopping) || phase === "image") return "One question at a time: the last one is being answered.";
  if (!source) return "Choose something to show first, then ask about it.";
  if (needsKey) return "Enter the API key first, then ask.";
  return phase === "stopped" || stopping ? "Reconnect first, then ask." : "There is no connection yet: ask again in a moment.";
}

export function unansweredHint(question) {
  return `“${question}” was not answered. Ask it again.`;
}

/** Returns what Apply has done where there is nothing to caption yet. */
export function keptSettings() {
  return "Kept: what you show next is captioned with these settings.";
}

/** Returns what the list is for while it is empty. */
export function listHint(source) {
  if (source && !source.hasVideo) return "Your questions and their answers are listed here.";
  const captions = "Each caption is listed here at its time.";
  return source?.isStream ? captions : `${captions} Choose one to go there.`;
}

/** Returns the statistics of a session as text, short enough for the top of the page; the figures have the rest. */
export function sessionSummary({ frames, captioned }) {
  return `Session ended: ${frames} ${frames === 1 ? "frame" : "frames"}, ${captioned} captioned`;
}
