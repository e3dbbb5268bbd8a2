// The map: images and prototypes as points on a canvas.
"use strict";

const SIDE = 10000; // positions on the map are whole numbers up to this one
const REACH = 14; // pixels around the pointer within which a point is meant
const STEP = 1.4;

const canvas = at("map");
const pen = canvas.getContext("2d");
let site, points, tables;
// A position p is drawn at p * scale + (left, top), in pixels of the page.
let view = null;
let shown = []; // of the points that are drawn: { image, k, cluster, x, y, prototype }
let selected = null;
let tint = () => "grey";

function settings() {
  return Object.fromEntries(new FormData(at("controls")));
}

// A colour for one of so many: evenly apart where they are few; else the golden angle keeps neighbouring numbers apart.
function hue(number, count) {
  const angle = count <= 24 ? number * 360 / count : (number * 137.508) % 360;
  return `hsl(${angle} 65% ${number % 2 ? 42 : 56}%)`;
}

// From tight, blue, to loose, yellow: by rank, so that a few extreme values do not take the whole scale.
function byTightness(concentration) {
  const order = [...concentration.keys()].sort((a, b) => concentration[a] - concentration[b]);
  const rank = new Array(order.length);
  order.forEach((cluster, place) => { rank[cluster] = place / Math.max(1, order.length - 1); });
  return (point) => `hsl(${250 - 195 * rank[point.cluster]} 70% 50%)`;
}

function choose() {
  const { show, k, colour } = settings();
  const place = site.ks.indexOf(Number(k));
  const table = tables.get(site.ks[place]);
  shown = [];
  if (show !== "prototypes") {
    points.images.forEach((image, i) => {
      const [x, y] = points.at[i];
      shown.push({ image, cluster: points.clusters[place][i], label: points.labels?.[i], x, y, prototype: false });
    });
  }
  if (show !== "images") {
    points.prototypes[place].forEach(([x, y], cluster) => {
      if (x >= 0) shown.push({ cluster, label: table.label?.[cluster], x, y, prototype: true });
    });
  }
  tint = { cluster: (point) => hue(point.cluster, Number(k)), label: (point) => hue(point.label, site.labels.length),
    tightness: byTightness(table.concentration) }[colour];
  selected = null;
  explain(colour, table);
  draw();
}

function explain(colour, table) {
  const entry = (tone, text) => {
    const dot = make("span");
    dot.style.background = tone;
    return make("li", {}, dot, text);
  };
  let entries = [];
  if (colour === "label") entries = site.labels.slice(0, 100).map((name, label) => entry(hue(label, site.labels.length), name));
  if (colour === "tightness") {
    const order = [...table.concentration.keys()].sort((a, b) => table.concentration[a] - table.concentration[b]);
    entries = [["tightest", order[0]], ["loosest", order[order.length - 1]]].map(([word, cluster]) =>
      entry(tint({ cluster }), `${word}: φ ${table.concentration[cluster]}`));
  }
  at("legend").replaceChildren(...entries);
}

function fit() {
  const { clientWidth: width, clientHeight: height } = canvas;
  const scale = Math.min(width, height) / SIDE * 0.94;
  view = { scale, left: (width - SIDE * scale) / 2, top: (height - SIDE * scale) / 2 };
}

function onPage(point) {
  return [point.x * view.scale + view.left, point.y * view.scale + view.top];
}

function draw() {
  const ratio = devicePixelRatio || 1;
  const { clientWidth: width, clientHeight: height } = canvas;
  canvas.width = width * ratio;
  canvas.height = height * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  const text = getComputedStyle(canvas).color;
  for (const point of shown) {
    const [x, y] = onPage(point);
    if (x < -9 || y < -9 || x > width + 9 || y > height + 9) continue;
    pen.fillStyle = tint(point);
    pen.beginPath();
    if (point.prototype) {
      pen.moveTo(x, y - 7);
      pen.lineTo(x + 7, y);
      pen.lineTo(x, y + 7);
      pen.lineTo(x - 7, y);
      pen.closePath();
      pen.strokeStyle = text;
      pen.stroke();
    } else {
      pen.arc(x, y, 2.5, 0, 2 * Math.PI);
    }
    pen.fill();
  }
  if (selected) {
    const [x, y] = onPage(selected);
    pen.strokeStyle = text;
    pen.lineWidth = 2;
    pen.beginPath();
    pen.arc(x, y, 10, 0, 2 * Math.PI);
    pen.stroke();
    pen.lineWidth = 1;
  }
}

// The point that is nearest to a place on the page, prototypes first, if one is within reach.
function pointAt(x, y) {
  let best = null, least = REACH * REACH;
  for (const point of shown) {
    const [left, top] = onPage(point);
    const far = (left - x) ** 2 + (top - y) ** 2 - (point.prototype ? 40 : 0);
    if (far < least) [best, least] = [point, far];
  }
  return best;
}

function address(point) {
  return `cluster.html#${settings().k}/${point.cluster}`;
}

async function select(point) {
  if (point === selected) return;
  selected = point;
  draw();
  at("tip").hidden = true;
  if (!point) return;
  const k = settings().k;
  const image = point.prototype ? (await clusterOf(k, point.cluster)).images[0] : point.image;
  const name = nameOf(await imageOf(site, image));
  if (point !== selected) return; // another one came meanwhile
  const inCluster = `cluster ${point.cluster} of ${k}`;
  const words = point.prototype ? `prototype of ${inCluster}, nearest image ${name}` : `${name}, ${inCluster}`;
  at("tip").replaceChildren(picture(site, image), make("span", { className: "small" }, words));
  const [x, y] = onPage(point);
  at("tip").hidden = false;
  at("tip").style.left = `${Math.max(0, Math.min(x + 14, canvas.clientWidth - at("tip").offsetWidth))}px`;
  at("tip").style.top = `${Math.max(0, Math.min(y + 14, canvas.clientHeight - at("tip").offsetHeight))}px`;
  at("selected").replaceChildren(make("a", { href: `image.html#${image}` }, name), ", ",
    make("a", { href: address(point) }, inCluster));
}

function zoom(factor, x = canvas.clientWidth / 2, y = canvas.clientHeight / 2) {
  view = { scale: view.scale * factor, left: x - (x - view.left) * factor, top: y - (y - view.top) * factor };
  at("tip").hidden = true;
  draw();
}

// The nearest point in a direction from the selected one; sideways counts double.
function step(right, down) {
  const from = selected ? onPage(selected) : [canvas.clientWidth / 2, canvas.clientHeight / 2];
  let best = null, least = Infinity;
  for (const point of shown) {
    const [x, y] = onPage(point);
    const along = (x - from[0]) * right + (y - from[1]) * down;
    const aside = Math.abs((x - from[0]) * down) + Math.abs((y - from[1]) * right);
    if (point !== selected && along > 0.5 && along + 2 * aside < least) [best, least] = [point, along + 2 * aside];
  }
  if (!best) return;
  const [x, y] = onPage(best);
  const { clientWidth: width, clientHeight: height } = canvas;
  if (x < 0 || y < 0 || x > width || y > height) view = { ...view, left: view.left + width / 2 - x, top: view.top + height / 2 - y };
  select(best);
}

const KEYS = {
  ArrowLeft: () => step(-1, 0), ArrowRight: () => step(1, 0), ArrowUp: () => step(0, -1), ArrowDown: () => step(0, 1),
  "+": () => zoom(STEP), "=": () => zoom(STEP), "-": () => zoom(1 / STEP), 0: showAll, Escape: () => select(null),
  Enter: () => { if (selected) location.href = address(selected); },
};

function showAll() {
  fit();
  draw();
}

function listen() {
  let from = null, moved = false;
  const here = (event) => [event.offsetX, event.offsetY];
  canvas.onkeydown = (event) => {
    if (!(event.key in KEYS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    KEYS[event.key]();
  };
  canvas.onpointerdown = (event) => {
    [from, moved] = [here(event), false];
    canvas.setPointerCapture(event.pointerId);
  };
  canvas.onpointermove = (event) => {
    const [x, y] = here(event);
    if (!from) return select(pointAt(x, y));
    if (!moved && Math.hypot(x - from[0], y - from[1]) < 4) return;
    view = { ...view, left: view.left + x - from[0], top: view.top + y - from[1] };
    [from, moved] = [[x, y], true];
    at("tip").hidden = true;
    draw();
  };
  canvas.onpointerup = (event) => {
    const point = from && !moved ? pointAt(...here(event)) : null;
    from = null;
    if (!point) return;
    // A finger does not hover: its tap shows, and the links below the map open.
    if (event.pointerType === "mouse") location.href = address(point);
    else select(point);
  };
  canvas.onpointercancel = () => { from = null; };
  canvas.onpointerleave = () => { if (!from) select(null); };
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(event.deltaY < 0 ? STEP : 1 / STEP, ...here(event));
  }, { passive: false });
  at("in").onclick = () => zoom(STEP);
  at("out").onclick = () => zoom(1 / STEP);
  at("all").onclick = showAll;
  at("controls").oninput = choose;
  at("controls").onsubmit = (event) => event.preventDefault();
  addEventListener("resize", showAll);
}

async function open(found) {
  site = found;
  points = await load("map");
  tables = new Map();
  for (const k of site.ks) tables.set(k, await load(`clusters/${k}`));
  listen();
  fit();
  choose();
}

present(open);
