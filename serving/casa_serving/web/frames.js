// The frames of a <video> as it plays, as small image files.

// The server shrinks pictures to what the model sees; more than this only costs time on the way.
const MAX_SIDE = 640;
const TYPE = "image/webp";
const QUALITY = 0.95;
// Between two frames that are shown, on a busy machine too.
const MAX_SILENCE_MS = 1000;

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
  const count = () => video.getVideoPlaybackQuality().totalVideoFrames;
  let told = { at: 0, frames: 0 }; // When the browser last told of a frame, and how many had been shown.
  const next = (_, { mediaTime }) => {
    video.requestVideoFrameCallback(next); // First, so that no error ends the watch.
    told = { at: performance.now(), frames: count() };
    onFrame(mediaTime);
  };
  video.requestVideoFrameCallback(next);
  // Chromium 156 tells of no frame any more, until another video is loaded, where a video goes to another window while a
  // call is due: the page was busy as its small window opened or closed. Some four times a second it still tells the time.
  video.addEventListener("timeupdate", () => {
    const isShown = count() > told.frames + 1 && !video.paused && !video.seeking && !video.ownerDocument.hidden;
    if (isShown && performance.now() - told.at > MAX_SILENCE_MS) onFrame(video.currentTime);
  });
}

/**
 * Returns the picture that the video shows now as an image file.
 * @param {HTMLVideoElement} video
 * @param {HTMLCanvasElement} canvas is drawn on
 * @param {{max_frame_side: number, max_frame_pixels: number}} limits the server's
 */
export function takePicture(video, canvas, limits) {
  const side = Math.min(limits.max_frame_side, Math.floor(Math.sqrt(limits.max_frame_pixels)));
  draw(canvas, video, video.videoWidth, video.videoHeight, side);
  return new Promise((resolve) => canvas.toBlob(resolve, TYPE, QUALITY));
}

/** Draws a picture on a canvas, which gets its size: that of the picture, or what `maxSide` and the page allow. */
export function draw(canvas, picture, width, height, maxSide = MAX_SIDE) {
  const scale = Math.min(1, Math.min(maxSide, MAX_SIDE) / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
}
