"use strict";

// Light and dark: the system's choice until the button is used.
const theme = document.getElementById("theme");
const system = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  const asked = document.documentElement.dataset.theme;
  return asked ? asked === "dark" : system.matches;
}
function nameTheme() {
  theme.textContent = isDark() ? "Light" : "Dark";
}
theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = isDark() ? "light" : "dark";
  nameTheme();
});
system.addEventListener("change", nameTheme);
nameTheme();

// The web of attention: a query shows what it keeps.
const { tokens, rows } = JSON.parse(document.getElementById("attention").textContent);
const readout = document.getElementById("readout");
const hint = readout.textContent;
const webs = ["dense", "sparse"].map((name) => document.getElementById(`picture-web-${name}`));
let pinned = null;

function show(query) {
  for (const [number, web] of webs.entries()) {
    web.classList.toggle("chosen", query !== null);
    const keys = new Map();
    for (const [key, dense, sparse, kept] of query === null ? [] : rows[query]) {
      if (number === 0 || kept) keys.set(key, number === 0 ? dense : sparse);
    }
    for (const arc of web.querySelectorAll(".arc")) {
      const on = Number(arc.dataset.q) === query;
      arc.classList.toggle("on", on);
      if (on) arc.style.setProperty("--weight", String(0.25 + 0.75 * (keys.get(Number(arc.dataset.k)) ?? 0) ** 0.5));
    }
    for (const token of web.querySelectorAll(".token, .word")) {
      const at = Number(token.dataset.q);
      token.classList.toggle("query", at === query);
      token.classList.toggle("key", keys.has(at));
      token.style.setProperty("--share", String(0.12 + 0.6 * (keys.get(at) ?? 0)));
      if (token.classList.contains("token")) token.setAttribute("aria-pressed", String(at === query));
    }
  }
  tell(query);
}

function tell(query) {
  if (query === null) {
    readout.textContent = hint;
    return;
  }
  const kept = rows[query].filter((entry) => entry[3]);
  const held = kept.reduce((sum, entry) => sum + entry[1], 0);
  const list = document.createElement("ul");
  for (const [key, , sparse] of [...kept].sort((a, b) => b[2] - a[2])) {
    const item = document.createElement("li");
    const word = document.createElement("bdi");
    word.textContent = tokens[key];
    const weight = document.createElement("b");
    weight.textContent = ` ${sparse.toFixed(3)}`;
    item.append(word, weight);
    list.append(item);
  }
  const name = document.createElement("bdi");
  name.textContent = tokens[query];
  readout.replaceChildren(
    "Query “", name,
    `” keeps ${kept.length} of ${rows[query].length} keys, ${(100 * held).toFixed(0)}% of its dense weight. ` +
    "Weights after Sparse-K:", list,
  );
}

for (const web of webs) {
  const own = [...web.querySelectorAll(".token")];
  own[0].setAttribute("tabindex", "0"); // one stop of the Tab key; arrow keys go on from it
  const at = (event) => {
    const found = event.target.closest(".token, .word");
    return found === null ? null : Number(found.dataset.q);
  };
  web.addEventListener("pointerover", (event) => {
    const query = at(event);
    if (query !== null) show(query);
  });
  web.addEventListener("pointerleave", () => show(pinned));
  web.addEventListener("click", (event) => {
    const query = at(event);
    pinned = query === pinned ? null : query;
    show(pinned);
  });
  web.addEventListener("focusin", (event) => {
    const query = at(event);
    if (query === null) return;
    own.forEach((token, i) => token.setAttribute("tabindex", i === query ? "0" : "-1"));
    show(query);
  });
  web.addEventListener("focusout", () => show(pinned));
  web.addEventListener("keydown", (event) => {
    const query = at(event);
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (query !== null && step && own[query + step]) {
      event.preventDefault();
      own[query + step].focus();
    } else if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      pinned = query === pinned ? null : query;
      show(query);
    } else if (event.key === "Escape") {
      pinned = null;
      show(null);
    }
  });
}

// Matrices: a cell tells its value below the picture.
for (const tip of document.querySelectorAll("output.tip")) {
  const figure = tip.parentElement;
  const tellCell = (event) => {
    const title = event.target.closest("[data-q]")?.querySelector("title");
    if (title) tip.textContent = title.textContent;
  };
  figure.addEventListener("pointerover", tellCell);
  figure.addEventListener("click", tellCell);
}
