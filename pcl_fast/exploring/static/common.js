// What all pages share: loading data, and making elements out of it. Text from the data set is only ever set as text.
"use strict";

const waiting = new Map();
const loaded = new Map();

// Every file in data/ calls this with its name and what it holds.
function receive(name, content) {
  waiting.get(name)(content);
}

// Load data/NAME.js, once. A page that was opened from disk may not fetch, but it may load scripts.
function load(name) {
  if (!loaded.has(name)) {
    loaded.set(name, new Promise((resolve, reject) => {
      waiting.set(name, resolve);
      const script = document.createElement("script");
      script.src = `data/${name}.js`;
      script.onerror = () => reject(new Error(`data/${name}.js is missing`));
      document.head.append(script);
    }));
  }
  return loaded.get(name);
}

function at(id) {
  return document.getElementById(id);
}

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function plural(count, what) {
  return `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
}

// Show image `id` in an element, out of its sheet.
function paint(site, element, id) {
  const sheet = Math.floor(id / site.perSheet);
  const inSheet = Math.min(site.perSheet, site.images - sheet * site.perSheet);
  const place = id % site.perSheet;
  const rows = Math.ceil(inSheet / site.across);
  const left = (place % site.across) / (site.across - 1);
  const top = rows > 1 ? Math.floor(place / site.across) / (rows - 1) : 0;
  element.style.backgroundImage = `url("sheets/${sheet}.webp")`;
  element.style.backgroundSize = `${site.across * 100}% ${rows * 100}%`;
  element.style.backgroundPosition = `${left * 100}% ${top * 100}%`;
  element.classList.toggle("coarse", site.tile < 48);
}

// What is known of an image.
async function imageOf(site, id) {
  const chunk = await load(`images/${Math.floor(id / site.perSheet)}`);
  const place = id % site.perSheet;
  return {
    path: chunk.paths[place],
    label: chunk.labels && site.labels[chunk.labels[place]],
    clusters: chunk.clusters.map((of) => of[place]),
    distances: chunk.distances.map((of) => of[place]),
    near: chunk.near[place],
    nearDistances: chunk.nearDistances[place],
  };
}

function nameOf(image) {
  return image.label === null ? image.path : `${image.path}, label ${image.label}`;
}

// A picture of image `id`; its name is its text alternative.
function picture(site, id) {
  const element = make("span", { className: "picture" });
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `image ${id}`);
  paint(site, element, id);
  imageOf(site, id).then((image) => {
    element.setAttribute("aria-label", nameOf(image));
    element.title = nameOf(image);
  });
  return element;
}

function thumb(site, id, note = "") {
  const link = make("a", { className: "thumb", href: `image.html#${id}` }, picture(site, id));
  if (note) link.append(make("span", { className: "small" }, note));
  return link;
}

// What is known of cluster `id` of `k`.
async function clusterOf(k, id) {
  const table = await load(`clusters/${k}`);
  let chunk = table.begins.length - 1;
  while (table.begins[chunk] > id) chunk--;
  const members = (await load(`members/${k}/${chunk}`))[id - table.begins[chunk]];
  return { ...members, size: table.size[id], concentration: table.concentration[id] };
}

function labelled(site, table, id) {
  if (!table.label || table.label[id] < 0) return "";
  return `${site.labels[table.label[id]]}, ${Math.round(table.purity[id] * 100)}% pure`;
}

const ON_CARD = 8;

// A card of cluster `id` of `k`, with its nearest images.
function card(site, k, table, id, note = "") {
  const pictures = make("span", { className: "pictures" });
  const link = make("a", { href: `cluster.html#${k}/${id}` },
    make("strong", {}, `Cluster ${id} of ${k}`), ` ${plural(table.size[id], "image").replace(" ", "\u00a0")}`, pictures,
    make("span", { className: "small" },
      [labelled(site, table, id), `φ ${table.concentration[id]}`, note].filter(Boolean).join(" · ")));
  if (table.size[id]) {
    clusterOf(k, id).then((cluster) =>
      pictures.append(...cluster.images.slice(0, ON_CARD).map((image) => picture(site, image))));
  }
  return make("li", {}, link);
}

// Fill an element with what `show` makes of items, some at a time; `button` shows more.
function inParts(element, button, items, count, show) {
  let shown = 0;
  const more = () => {
    element.append(...items.slice(shown, shown + count).map(show));
    shown = Math.min(shown + count, items.length);
    if (button) button.hidden = shown === items.length;
  };
  element.replaceChildren();
  if (button) button.onclick = more;
  more();
}

// Show a page with what the site is, and say when it is there.
function present(show) {
  return load("site").then(show)
    .catch((error) => at("main").prepend(make("p", { className: "note" }, `This page cannot be shown: ${error.message}.`)))
    .finally(() => at("main").removeAttribute("aria-busy"));
}

// Present a page now, and again when the part of its address behind # changes.
function begin(show) {
  addEventListener("hashchange", () => present(show));
  present(show);
}

// The address keeps what is behind #: it says what is shown.
document.querySelector(".skip").onclick = (event) => {
  event.preventDefault();
  at("main").focus();
};
