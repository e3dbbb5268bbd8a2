// One image: image.html#NUMBER.
"use strict";

begin(async (site) => {
  const id = Number(location.hash.slice(1));
  if (!location.hash.slice(1) || !(id >= 0 && id < site.images)) throw new Error(`there is no image ${location.hash.slice(1)}`);
  const image = await imageOf(site, id);
  document.title = at("name").textContent = nameOf(image);
  paint(site, at("picture"), id);
  at("picture").setAttribute("aria-label", nameOf(image));
  at("clusters").replaceChildren(...site.ks.map((k, place) => make("li", {},
    make("a", { href: `cluster.html#${k}/${image.clusters[place]}` }, `cluster ${image.clusters[place]} of ${k}`),
    ` at distance ${image.distances[place]}`)));
  at("near").replaceChildren(...image.near.map((other, place) =>
    thumb(site, other, String(image.nearDistances[place]))));
});
