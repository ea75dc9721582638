// The captions as a text track of the video, which browsers draw where the page does not: in full screen and in a
// picture in picture. On the page itself the caption stands under the picture, which it never covers.

const END_S = 1e9; // A caption stands until the next one.

export class CaptionTrack {
  /** @param {HTMLVideoElement} video */
  constructor(video) {
    this.video = video;
    this.track = video.addTextTrack("captions", "Captions", "en");
    this.cues = new Map(); // Entry -> its cue.
    const events = ["enterpictureinpicture", "leavepictureinpicture", "webkitbeginfullscreen", "webkitendfullscreen"];
    for (const name of events) video.addEventListener(name, () => this.#choosePlace());
    document.addEventListener("fullscreenchange", () => this.#choosePlace());
    this.#choosePlace();
  }

  /** Shows an entry as it is now; `captions` are all, by time. */
  show(entry, captions) {
    if (!this.cues.has(entry)) {
      const cue = new VTTCue(entry.timestamp, END_S, "");
      this.cues.set(entry, cue);
      this.track.addCue(cue);
    }
    this.cues.get(entry).text = plain(entry.text.trim());
    this.#setEnds(captions);
  }

  remove(entry, captions) {
    if (!this.cues.has(entry)) return;
    this.track.removeCue(this.cues.get(entry));
    this.cues.delete(entry);
    this.#setEnds(captions);
  }

  clear() {
    for (const cue of this.cues.values()) this.track.removeCue(cue);
    this.cues.clear();
  }

  #setEnds(captions) {
    for (const [index, entry] of captions.entries()) {
      const end = captions[index + 1]?.timestamp ?? END_S;
      const cue = this.cues.get(entry);
      if (cue && cue.endTime !== end) cue.endTime = end;
    }
  }

  #choosePlace() {
    const { video } = this;
    const alone = [document.fullscreenElement, document.pictureInPictureElement].includes(video);
    this.track.mode = alone || video.webkitDisplayingFullscreen ? "showing" : "hidden";
  }
}

/** Returns text in which nothing is WebVTT's markup. */
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}
