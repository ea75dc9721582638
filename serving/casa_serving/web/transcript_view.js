// The list of captions and answers beside the video.

/** Returns a time as m:ss.t, with hours where there are some. */
export function clock(seconds) {
  const tenths = Math.round(seconds * 10);
  const [hours, minutes] = [Math.floor(tenths / 36000), Math.floor(tenths / 600) % 60];
  const rest = ((tenths % 600) / 10).toFixed(1).padStart(4, "0");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${rest}` : `${minutes}:${rest}`;
}

export class TranscriptView {
  /** @param {(time: number) => void} onSeek is called when an entry is chosen */
  constructor(list, scroll, hint, onSeek) {
    Object.assign(this, { list, scroll, hint, onSeek });
    this.items = new Map(); // Entry -> its <li>.
    this.current = null;
    this.reached = null; // The entry that Tab goes to; the arrow keys go on from there.
    this.isAtEnd = true; // The newest entry is in sight.
    this.isMoving = false; // The list goes to its end with the next picture.
    list.addEventListener("keydown", (event) => this.#onKey(event));
    scroll.addEventListener("scroll", () => this.#onScroll());
  }

  /** Shows an entry as it is now: adds it at its place, or updates its text. @param {Timeline} entries all of them */
  show(entry, entries) {
    if (!this.items.has(entry)) this.#insert(entry, entries);
    this.items.get(entry).querySelector(".text").textContent = entry.text || "…";
    this.hint.hidden = true;
    if (entries.last === entry && this.isAtEnd) this.#moveToEnd();
  }

  remove(entry) {
    const item = this.items.get(entry);
    if (item?.contains(document.activeElement)) this.#keepFocus(item.previousElementSibling ?? item.nextElementSibling);
    item?.remove();
    this.items.delete(entry);
    if (entry === this.reached) this.#reach(this.items.keys().next().value ?? null);
  }

  /** Marks the caption that belongs to what the video shows. */
  mark(entry) {
    if (entry === this.current) return;
    this.items.get(this.current)?.removeAttribute("aria-current");
    this.items.get(entry)?.setAttribute("aria-current", "true");
    this.current = entry;
  }

  clear() {
    if (this.list.contains(document.activeElement)) this.#keepFocus(null);
    this.items.clear();
    this.list.replaceChildren();
    this.current = this.reached = null;
    this.isAtEnd = true;
    this.hint.hidden = false;
  }

  /** Goes through the list by the arrow keys, Home and End: one stop of Tab, however many captions there are. */
  #onKey(event) {
    const { previousElementSibling: before, nextElementSibling: after } = event.target.closest("li");
    const { firstElementChild: first, lastElementChild: last } = this.list;
    const next = { ArrowDown: after, ArrowUp: before, Home: first, End: last }[event.key];
    if (!next) return;
    event.preventDefault();
    next.querySelector("button").focus();
  }

  /** Gives the focus of an item that goes to another one, or to the list itself. */
  #keepFocus(item) {
    (item?.querySelector("button") ?? this.scroll).focus();
  }

  #onScroll() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroll;
    this.isAtEnd = scrollHeight - scrollTop - clientHeight < 150; // About two entries.
  }

  /** Once a picture: the browser lays out the list then anyway, and not for each token. */
  #moveToEnd() {
    if (this.isMoving) return;
    this.isMoving = true;
    requestAnimationFrame(() => {
      this.isMoving = false;
      if (this.isAtEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
    });
  }

  #reach(entry) {
    this.items.get(this.reached)?.querySelector("button").setAttribute("tabindex", "-1");
    this.items.get(entry)?.querySelector("button").setAttribute("tabindex", "0");
    this.reached = entry;
  }

  #insert(entry, entries) {
    const item = this.#build(entry);
    this.list.insertBefore(item, this.items.get(entries.after(entry)) ?? null);
    this.items.set(entry, item);
    if (!this.reached) this.#reach(entry);
  }

  #build(entry) {
    const item = document.createElement("li");
    item.className = entry.kind;
    const button = document.createElement("button");
    button.type = "button";
    button.tabIndex = -1;
    button.addEventListener("focus", () => this.#reach(entry));
    button.append(part("time", "time", clock(entry.timestamp)));
    if (entry.kind === "question") button.append(part("span", "asked", entry.question));
    button.append(part("span", "text", ""));
    button.addEventListener("click", () => this.onSeek(entry.timestamp));
    item.append(button);
    return item;
  }
}

function part(tag, name, text) {
  const element = document.createElement(tag);
  element.className = name;
  element.textContent = text;
  return element;
}
