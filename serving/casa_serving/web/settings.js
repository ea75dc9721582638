// The form of a session's settings. Empty fields are the server's defaults, which its answer contains.

import { address } from "./live_client.js";

/** Bounds the fields of the page as the server does, which has the last word anyway. */
export async function boundFields(document) {
  const answer = await fetch(address("web/fields.json")).catch(() => null);
  const bounds = answer?.ok ? await answer.json() : {};
  for (const [name, attributes] of Object.entries(bounds)) {
    for (const field of document.getElementsByName(name)) {
      for (const [attribute, value] of Object.entries(attributes)) field.setAttribute(attribute, value);
    }
  }
}

/** Returns the form's settings for session.create. */
export function readSettings(form) {
  const fields = [...form.elements].filter((field) => field.name && field.value.trim() !== "");
  return Object.fromEntries(fields.map((field) => [field.name, field.type === "number" ? field.valueAsNumber : field.value]));
}

/** Shows the settings of the session that the server opened. */
export function fillSettings(form, settings) {
  for (const field of form.elements) {
    if (field.name in settings) field.value = settings[field.name];
  }
}
