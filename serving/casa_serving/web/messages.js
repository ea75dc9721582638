// The page's error messages: what happened, and what to do.

/** A video or camera that cannot be shown; the message is for people. */
export class SourceError extends Error {}

export function fileProblem(file) {
  const kind = file.type ? ` (${file.type})` : "";
  return `“${file.name}”${kind} cannot be played by this browser: it has no picture, or a format that the browser does not support. Choose an MP4 (H.264) or WebM file.`;
}

export function cameraProblem(name, message) {
  if (name === "insecure") {
    return "Browsers give the camera only to pages on this machine (localhost) or behind HTTPS. Open the page there, or choose a file.";
  }
  if (name === "NotAllowedError") return "The camera was not allowed. Allow it in the browser’s address bar, then try again.";
  if (name === "NotFoundError") return "No camera was found. Connect one, or choose a file.";
  return `The camera could not be started (${message || name}). Is another program using it?`;
}

const RECONNECT = "Reconnect goes on with the captions so far.";
// Fatal errors whose message from the server is meant for programs.
const FATAL = {
  slow_client: `This browser or its network was too slow for the server. ${RECONNECT}`,
  engine_error: `The model’s engine failed. ${RECONNECT}`,
};
const CLOSED = {
  1001: `The server is shutting down. When it is back, ${RECONNECT}`,
  1009: "A frame was larger than the server accepts in one message.",
  1012: `The server is shutting down. When it is back, ${RECONNECT}`,
};

/** Returns why a connection ended unasked; `error` is the server's last error event, or null. */
export function endProblem(error, code) {
  if (error) return FATAL[error.code] ?? error.message;
  return CLOSED[code] ?? `The connection to the server broke (code ${code}). ${RECONNECT}`;
}

/** Returns why no connection came about; `status` is that of a plain HTTP request, null without a response. */
export function connectProblem(status, hadKey) {
  if (status === null) return `No server answers at ${location.host}. Is casa-serve still running? Then press Reconnect.`;
  if (status === 401) return hadKey ? "The server does not know this API key." : "This server asks for an API key.";
  return "The server runs but rejected the session: it may have been restarted without live sessions (--live-max-sessions), or does not allow this page’s address (--allowed-origins).";
}

/** Returns the statistics of a session as text. */
export function sessionSummary({ frames, captioned, silent, dropped, delay_ms: delay }) {
  const times = delay?.p50 == null ? "" : ` Delay ${Math.round(delay.p50)} ms (p50), ${Math.round(delay.p95)} ms (p95).`;
  return `Session ended: ${frames} frames, ${captioned} captioned, ${silent} silent, ${dropped} dropped.${times}`;
}
