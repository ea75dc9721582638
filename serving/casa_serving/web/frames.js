// The frames of a <video> as it plays, as small image files.

// The server shrinks pictures to what the model sees; more than this only costs time on the way.
const MAX_SIDE = 640;
const TYPE = "image/webp";
const QUALITY = 0.95;

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
    video.requestVideoFrameCallback(next); // First, so that no error ends the watch.
    onFrame(mediaTime);
  };
  video.requestVideoFrameCallback(next);
}

/**
 * Returns the picture that the video shows now as an image file.
 * @param {HTMLVideoElement} video
 * @param {HTMLCanvasElement} canvas is drawn on
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
