// All clusters of a granularity as cards: sorted, filtered, some at a time.
"use strict";

const AT_ONCE = 24;

function settings() {
  return Object.fromEntries(new FormData(at("controls")));
}

function take(site) {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const [name, value] of wanted) {
    const control = at("controls").elements[name];
    if (control) control.value = value;
  }
  if (!site.ks.includes(Number(settings().k))) at("controls").elements.k.value = site.ks[0];
}

function chosen(table, { sort, least, most, label }) {
  const kept = [...table.size.keys()].filter((id) =>
    (!least || table.size[id] >= Number(least)) && (!most || table.size[id] <= Number(most)) &&
    (!label || table.label[id] === Number(label)));
  if (sort === "id") return kept;
  const by = table[sort.replace("-", "")];
  const sign = sort.startsWith("-") || sort === "label" ? 1 : -1;
  return kept.sort((a, b) => sign * (by[a] - by[b]) || a - b);
}

async function show(site) {
  const wanted = settings();
  const table = await load(`clusters/${wanted.k}`);
  const ids = chosen(table, wanted);
  at("count").textContent = `${ids.length.toLocaleString("en")} of ${plural(table.size.length, "cluster")}`;
  inParts(at("cards"), at("more"), ids, AT_ONCE, (id) => card(site, wanted.k, table, id));
}

at("controls").onsubmit = (event) => event.preventDefault();
at("controls").oninput = () => {
  const given = Object.entries(settings()).filter(([, value]) => value);
  history.replaceState(null, "", `#${new URLSearchParams(given)}`);
  present(show);
};
begin((site) => {
  take(site);
  return show(site);
});
