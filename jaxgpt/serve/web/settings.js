// The panel of settings: what a conversation is answered with, and what this browser remembers.

import { $ } from "./dom.js";
import { recall, remember } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = ["system", "stop"];
const KEY = "jaxgpt.key";

/** The API key: kept until the tab is closed, and in no file. */
export const key = () => sessionStorage.getItem(KEY) ?? "";

/** Fills the panel from a conversation's settings. */
export function fill(settings) {
  for (const name of [...NUMBERS, ...TEXTS]) $(name).value = settings[name] ?? "";
  for (const name of ["temperature", "top_p"]) slide(name);
  $("plain").checked = Boolean(settings.plain);
}

/** A slider follows its number; without a number it stands at 1, dimmed, and the server's own value holds. */
function slide(name) {
  const slider = $(`${name}_slider`);
  slider.value = $(name).value === "" ? 1 : $(name).value;
  slider.classList.toggle("unset", $(name).value === "");
}

/** Calls back with the settings whenever one is changed, and with nothing when the key is. */
export function listen(changed, keyChanged) {
  const read = () => {
    const named = [...NUMBERS, ...TEXTS].map((name) => [name, $(name).value]);
    named.push(["plain", $("plain").checked]);
    const settings = Object.fromEntries(named.filter(([, value]) => value));
    remember("settings", settings);
    changed(settings);
  };
  for (const name of [...NUMBERS, ...TEXTS, "plain"]) $(name).addEventListener("input", read);
  for (const name of ["temperature", "top_p"]) {
    $(name).addEventListener("input", () => slide(name));
    $(`${name}_slider`).addEventListener("input", () => {
      $(name).value = $(`${name}_slider`).value;
      slide(name);
      read();
    });
  }
  $("fields").addEventListener("submit", (event) => event.preventDefault());
  $("reset").addEventListener("click", () => {
    for (const name of [...NUMBERS, "stop"]) $(name).value = "";
    fill({ system: $("system").value, plain: $("plain").checked });
    read();
  });
  $("probabilities").checked = recall("probabilities", true);
  $("probabilities").addEventListener("change", ({ target }) => remember("probabilities", target.checked));
  $("key").value = key();
  $("key").addEventListener("change", ({ target }) => {
    sessionStorage.setItem(KEY, target.value.trim());
    keyChanged();
  });
}

/** The fields of a request that settings ask for; what is not set is the server's to choose. */
export function asked(settings) {
  const numbers = NUMBERS.filter((name) => settings[name]).map((name) => [name, Number(settings[name])]);
  const stop = (settings.stop ?? "")
    .split("\n")
    .filter(Boolean)
    .map((line) => line.replaceAll("\\n", "\n"));
  return {
    ...Object.fromEntries(numbers),
    ...(stop.length && { stop }),
    ...($("probabilities").checked &&
      (settings.plain ? { logprobs: 5 } : { logprobs: true, top_logprobs: 5 })),
  };
}

/** Gives up probabilities for this visit where a failure says that the server has none; whether it did. */
export function withoutProbabilities({ field }) {
  if (!["logprobs", "top_logprobs"].includes(field) || !$("probabilities").checked) return false;
  $("probabilities").checked = false;
  return true;
}

/** Light, dark, or as the system has it. */
export function theme() {
  const show = (name) => {
    document.documentElement.dataset.theme = name;
    $("theme").value = name;
  };
  show(recall("theme", "system"));
  $("theme").addEventListener("change", ({ target }) => {
    remember("theme", target.value);
    show(target.value);
  });
}
