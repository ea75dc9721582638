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
  }

  /** Shows an entry as it is now: adds it at its place, or updates its text. */
  show(entry, entries) {
    const isLast = entries.at(-1) === entry;
    const atEnd = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight < 60;
    if (!this.items.has(entry)) this.#insert(entry, entries);
    this.items.get(entry).querySelector(".text").textContent = entry.text || "…";
    this.hint.hidden = true;
    if (isLast && atEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
  }

  remove(entry) {
    this.items.get(entry)?.remove();
    this.items.delete(entry);
  }

  /** Marks the caption that belongs to what the video shows. */
  mark(entry) {
    if (entry === this.current) return;
    this.items.get(this.current)?.removeAttribute("aria-current");
    this.items.get(entry)?.setAttribute("aria-current", "true");
    this.current = entry;
  }

  clear() {
    this.items.clear();
    this.list.replaceChildren();
    this.current = null;
    this.hint.hidden = false;
  }

  #insert(entry, entries) {
    const item = this.#build(entry);
    const next = entries[entries.indexOf(entry) + 1];
    this.list.insertBefore(item, this.items.get(next) ?? null);
    this.items.set(entry, item);
  }

  #build(entry) {
    const item = document.createElement("li");
    item.className = entry.kind;
    const button = document.createElement("button");
    button.type = "button";
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
