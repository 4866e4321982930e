// Elements without markup: text given to these functions stays text, whoever wrote it.

export const $ = (id) => document.getElementById(id);

/** An element; functions among its attributes listen to the event of that name, `true` is a bare attribute. */
export function h(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child != null && child !== false));
  return element;
}

/** A drawing of index.html's sprite. */
export function icon(name) {
  const [svg, use] = ["svg", "use"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `#${name}`);
  svg.append(use);
  return svg;
}

/** A button that shows a drawing and says a label. */
export function iconButton(label, name, action, attributes) {
  const all = {
    type: "button",
    class: "tool",
    "aria-label": label,
    title: label,
    click: action,
    ...attributes,
  };
  return h("button", all, icon(name));
}

/** Has a screen reader say something when it has finished what it is saying. */
export function announce(text) {
  $("status").textContent = text;
}

/** Shows a sentence for some seconds, with a button where there is something to do. */
export function toast(text, label, action) {
  const close = () => note.remove();
  const act = label && h("button", { type: "button", click: () => (close(), action()) }, label);
  const note = h("div", { class: "toast" }, h("span", {}, text), act, iconButton("Dismiss", "close", close));
  $("toasts").replaceChildren(note);
  setTimeout(close, 9000);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // not there on a page that came without TLS
  } catch {
    const area = h("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    before?.focus();
  }
  announce("Copied");
}

/** A copy button, which says for a moment that it has copied. */
export function copyButton(text, label = "Copy") {
  return iconButton(label, "copy", async ({ currentTarget }) => {
    await copy(text());
    currentTarget.replaceChildren(icon("check"));
    setTimeout(() => currentTarget.replaceChildren(icon("copy")), 1500);
  });
}

/** Offers a value as a JSON file. */
export function download(name, value) {
  const url = URL.createObjectURL(new Blob([JSON.stringify(value, null, 1)], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
