// The list of conversations, and the panels at both sides of the page.

import { $, h, iconButton } from "./dom.js";
import { recall, remember } from "./store.js";

/**
 * Shows the conversations.
 * @param {{rename: Function, remove: Function}} actions each takes a conversation, `rename` its new title too.
 */
export function list(conversations, current, isRunning, actions) {
  const focused = document.activeElement?.closest?.("#list li")?.dataset.id;
  $("list").replaceChildren(
    ...conversations.map((one) => item(one, one.id === current, isRunning(one), actions)),
  );
  if (focused)
    $("list")
      .querySelector(`[data-id="${CSS.escape(focused)}"] a`)
      ?.focus();
}

function item(conversation, isCurrent, isRunning, { rename, remove }) {
  const row = h("li", { "data-id": conversation.id });
  const edit = () => {
    const field = h("input", { "aria-label": "Name of the conversation", maxlength: "200" });
    field.value = conversation.title;
    let done = false;
    const end = (keep) => {
      if (done) return;
      done = true;
      rename(conversation, (keep && field.value.trim()) || conversation.title);
      $("list")
        .querySelector(`[data-id="${CSS.escape(conversation.id)}"] a`)
        ?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.isComposing || !["Enter", "Escape"].includes(event.key)) return;
      event.stopPropagation();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    row.replaceChildren(field);
    field.select();
  };
  const keys = { F2: edit, Delete: () => remove(conversation) };
  const link = h(
    "a",
    {
      href: `#${conversation.id}`,
      "aria-current": isCurrent && "page",
      keydown: ({ key }) => keys[key]?.(),
    },
    h("span", {}, conversation.title || "New conversation"),
    isRunning && h("i", { class: "dot", role: "img", "aria-label": "is being answered" }),
  );
  row.append(
    link,
    iconButton("Rename", "edit", edit),
    iconButton("Delete", "trash", () => remove(conversation)),
  );
  return row;
}

const narrow = matchMedia("(max-width: 899px)");

/** A panel that a button opens: beside the page where it is wide, else over it. */
export function panel(id, openAtFirst) {
  const [aside, button] = [$(id), $(`open-${id}`)];
  const others = [...document.body.children].filter((one) => one !== aside && one.matches("main, aside"));
  const set = (isOpen, focus = true) => {
    const held = aside.contains(document.activeElement);
    aside.hidden = !isOpen;
    button.setAttribute("aria-expanded", isOpen);
    document.body.classList.toggle(`with-${id}`, isOpen);
    for (const one of others) one.inert = isOpen && narrow.matches;
    if (!narrow.matches) remember(`panel.${id}`, isOpen);
    if (isOpen && narrow.matches && focus) aside.querySelector("button")?.focus();
    if (!isOpen && held) button.focus();
  };
  const closeIfOver = (event) => {
    if (!narrow.matches || aside.hidden) return;
    event?.stopPropagation();
    set(false);
  };
  button.addEventListener("click", () => set(aside.hidden));
  aside.addEventListener("keydown", (event) => event.key === "Escape" && closeIfOver(event));
  aside.querySelector(".close").addEventListener("click", () => set(false));
  $("backdrop").addEventListener("click", closeIfOver);
  narrow.addEventListener("change", () => set(!narrow.matches && recall(`panel.${id}`, openAtFirst), false));
  set(!narrow.matches && recall(`panel.${id}`, openAtFirst), false);
  return { open: () => set(true), closeIfOver };
}
