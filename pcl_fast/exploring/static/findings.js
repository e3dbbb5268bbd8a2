// Lists of images and clusters that want a look.
"use strict";

const AT_ONCE = 24;

function row(site, finding, values) {
  const named = Object.fromEntries(finding.columns.map((column, place) => [column, values[place]]));
  const parts = finding.imageColumns.map((column) => thumb(site, named[column]));
  if ("cluster" in named) {
    parts.push(make("a", { href: `cluster.html#${named.granularity}/${named.cluster}` },
      `cluster ${named.cluster} of ${named.granularity}`));
  }
  const rest = finding.columns.filter((column) =>
    !finding.imageColumns.includes(column) && column !== "cluster" && column !== "granularity");
  parts.push(make("span", { className: "small" }, rest.map((column) => `${column} ${named[column]}`).join(" · ")));
  return make("li", {}, ...parts);
}

async function show(site) {
  const found = await load("findings");
  for (const list of document.querySelectorAll("[data-finding]")) {
    const finding = found[list.dataset.finding];
    const button = document.querySelector(`[data-more="${list.dataset.finding}"]`);
    inParts(list, button, finding.rows, AT_ONCE, (values) => row(site, finding, values));
  }
  if (location.hash) document.getElementById(location.hash.slice(1))?.scrollIntoView();
}

present(show);
