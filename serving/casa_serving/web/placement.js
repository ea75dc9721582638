// Where the picture stands: on the page, alone on the whole screen, or in a small window over other programs.

import { play } from "./frames.js";
import { SourceError, placeProblem } from "./messages.js";

/** Whether this browser has a small window. */
export function hasSmallWindow(video) {
  return "documentPictureInPicture" in window || Boolean(document.pictureInPictureEnabled && video.requestPictureInPicture);
}

/** Fills the screen with picture and caption; a phone that fills it with videos only draws the text track. */
export async function fillScreen(stage, video) {
  if (document.fullscreenElement) await document.exitFullscreen();
  else if (stage.requestFullscreen) await allowed(stage.requestFullscreen());
  else video.webkitEnterFullscreen?.();
}

/**
 * Opens a small window with picture and caption, or closes it if it is open; browsers that have it for videos only draw
 * the text track there. `onOpen` gets the window's document.
 */
export async function toggleSmallWindow(stage, video, onOpen) {
  if (!("documentPictureInPicture" in window)) {
    if (document.pictureInPictureElement) await document.exitPictureInPicture();
    else await allowed(video.requestPictureInPicture());
    return;
  }
  if (documentPictureInPicture.window) {
    documentPictureInPicture.window.close();
    return;
  }
  const small = await allowed(documentPictureInPicture.requestWindow({ width: 480, height: 340 }));
  furnish(small.document);
  onOpen(small.document);
  const place = document.createComment("stage");
  small.addEventListener("pagehide", () => move(video, () => place.replaceWith(stage)), { once: true });
  move(video, () => {
    stage.replaceWith(place);
    small.document.body.append(stage);
  });
}

/** Moves a video that goes on playing where a browser pauses what is moved; Chromium 156 does not. */
function move(video, put) {
  const playing = !video.paused;
  put();
  if (playing) play(video);
}

function furnish(target) {
  const style = target.createElement("link");
  Object.assign(style, { rel: "stylesheet", href: new URL("web/style.css", document.baseURI).href });
  target.head.append(style);
  target.documentElement.lang = "en";
  target.title = document.title;
}

/** Waits for what a browser may refuse; rejects with an error message then. */
async function allowed(request) {
  try {
    return await request;
  } catch {
    throw new SourceError(placeProblem());
  }
}
