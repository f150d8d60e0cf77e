"use strict";
// Values under the pointer: of curves those of the nearest step, elsewhere what `data-tip` says.
const tip = document.getElementById("tip");

function show(event, text) {
  tip.textContent = text;
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  const beside = event.clientX + 14 + box.width > innerWidth;
  const x = beside ? event.clientX - 14 - box.width : event.clientX + 14;
  tip.style.left = Math.max(0, x) + "px";
  tip.style.top = Math.max(0, Math.min(event.clientY + 14, innerHeight - box.height)) + "px";
}

function read(svg, event) {
  const series = JSON.parse(svg.nextElementSibling.textContent);
  const box = svg.getBoundingClientRect();
  const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
  const lines = [];
  let nearest = null;
  for (const s of series) {
    let best = 0;
    s.px.forEach((px, i) => { if (Math.abs(px - x) < Math.abs(s.px[best] - x)) best = i; });
    lines.push(s.name + ": " + s.y[best] + " at step " + s.x[best]);
    if (nearest === null || Math.abs(s.px[best] - x) < Math.abs(nearest - x)) nearest = s.px[best];
  }
  const cursor = svg.querySelector(".cursor");
  cursor.setAttribute("x1", nearest);
  cursor.setAttribute("x2", nearest);
  cursor.setAttribute("visibility", "visible");
  show(event, lines.join("\n"));
}

for (const name of ["pointermove", "pointerdown"]) {
  document.addEventListener(name, (event) => {
    for (const cursor of document.querySelectorAll(".cursor")) cursor.setAttribute("visibility", "hidden");
    tip.style.display = "none";
    const chart = event.target.closest("svg.chart");
    const told = event.target.closest("[data-tip]");
    if (chart) read(chart, event);
    else if (told) show(event, told.dataset.tip);
  });
}
