// The form of a session's settings. Empty fields are the server's defaults, which its answer contains.

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
