// The form of a session's settings. It shows the server's own, and what a person has changed in them.

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

/**
 * Applies what a person has changed since the form was filled. Returns all that is wanted of the server then: `wanted`,
 * with these changes; an emptied field wants the server's default again.
 */
export function applyChanges(form, wanted) {
  const all = { ...wanted };
  for (const field of changedFields(form)) {
    field.defaultValue = field.value;
    if (field.value.trim() === "") delete all[field.name];
    else all[field.name] = field.type === "number" ? field.valueAsNumber : field.value;
  }
  return all;
}

/** Shows the settings of the session that the server opened, but for what a person is changing just now. */
export function fillSettings(form, settings) {
  const typing = new Set(changedFields(form));
  for (const field of form.elements) {
    if (!(field.name in settings) || typing.has(field)) continue;
    field.value = settings[field.name] ?? "";
    field.defaultValue = field.value; // As the field writes it.
  }
}

/** Returns what the page calls the settings that a message of the server names, with the bounds that they exceed. */
export function namedFields(form, message) {
  const words = new Set(message.match(/\w+/g));
  return [...form.elements].filter(({ name }) => words.has(name)).map(labelled);
}

// A field's own default is what the server has said of it last, or was asked for.
function changedFields(form) {
  return [...form.elements].filter((field) => field.name && field.value !== field.defaultValue);
}

function labelled(field) {
  const label = field.labels[0].firstChild.textContent.trim();
  const { rangeUnderflow, rangeOverflow } = field.validity;
  return rangeUnderflow || rangeOverflow ? `${label}, from ${field.min} to ${field.max}` : label;
}
