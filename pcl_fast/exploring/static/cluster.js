// One cluster: cluster.html#K/NUMBER.
"use strict";

const AT_ONCE = 96;

function overlap(site, k, mine, theirs, of) {
  const finer = k > mine;
  const list = make("ul", { className: "cards" });
  const button = make("button", { type: "button" }, "Show more");
  load(`clusters/${k}`).then((table) =>
    inParts(list, button, theirs, 12, ([id, count]) => card(site, k, table, id, `${count} of ${of} images here`)));
  return make("section", {},
    make("h2", {}, finer ? `Splits into, of ${k} clusters` : `Belongs to, of ${k} clusters`), list, button);
}

begin(async (site) => {
  const [k, id] = location.hash.slice(1).split("/").map(Number);
  if (!site.ks.includes(k) || !(id >= 0 && id < k)) throw new Error(`there is no cluster ${location.hash.slice(1)}`);
  const [table, cluster] = [await load(`clusters/${k}`), await clusterOf(k, id)];
  document.title = at("name").textContent = `Cluster ${id} of ${k}`;
  at("summary").textContent = [plural(cluster.size, "image"), `concentration φ ${cluster.concentration}`,
    labelled(site, table, id)].filter(Boolean).join(" · ");
  at("before").href = `cluster.html#${k}/${(id + k - 1) % k}`;
  at("after").href = `cluster.html#${k}/${(id + 1) % k}`;
  inParts(at("members"), at("more"), cluster.images, AT_ONCE, (image) => thumb(site, image));
  at("borders").hidden = !cluster.border.length;
  at("border").replaceChildren(...cluster.border.map((image) => thumb(site, image)));
  at("overlaps").replaceChildren(...Object.entries(cluster.overlaps).map(([other, theirs]) =>
    overlap(site, Number(other), k, theirs, cluster.size)));
  at("near").replaceChildren(...cluster.near.map((other, place) =>
    card(site, k, table, other, `distance ${cluster.nearDistances[place]}`)));
});
