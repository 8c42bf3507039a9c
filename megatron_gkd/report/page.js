"use strict";
// Values under the pointer, and runs that are shown or not. The page is whole without it.
const tip = document.getElementById("tip");
const numbers = (text) => text.split(" ");

function nearest(steps, step) {
  let best = 0;
  for (let at = 1; at < steps.length; at++) {
    if (Math.abs(steps[at] - step) < Math.abs(steps[best] - step)) best = at;
  }
  return best;
}

for (const svg of document.querySelectorAll(".plot svg")) {
  const { left, right, low, high } = svg.dataset;
  const width = svg.viewBox.baseVal.width, height = svg.viewBox.baseVal.height;
  const rule = document.createElementNS(svg.namespaceURI, "line");
  let curves = null;
  rule.setAttribute("class", "rule");
  rule.setAttribute("y1", 20);
  rule.setAttribute("y2", height - 30);

  svg.addEventListener("pointermove", (event) => {
    curves ??= [...svg.querySelectorAll(".series")].map((series) => ({
      series, steps: numbers(series.dataset.steps).map(Number), values: numbers(series.dataset.values),
    }));
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * width;
    const step = +low + (x - left) / (right - left) * (high - low);
    const shown = curves.filter(({ series }) => getComputedStyle(series).display !== "none");
    if (!shown.length || x < left - 8) return hide();
    const all = shown.flatMap(({ steps }) => steps[nearest(steps, step)]);
    const at = all[nearest(all, step)];
    const place = +left + (at - low) / (high - low) * (right - left);
    rule.setAttribute("x1", place);
    rule.setAttribute("x2", place);
    svg.append(rule);
    tip.replaceChildren();
    const head = document.createElement("div");
    head.className = "at";
    head.textContent = `step ${at.toLocaleString("en")}${svg.dataset.unit ? ", " + svg.dataset.unit : ""}`;
    tip.append(head);
    for (const { series, steps, values } of shown) {
      const index = nearest(steps, at);
      if (Math.abs(steps[index] - at) > (high - low) / 50) continue;
      const line = document.createElement("div");
      line.className = series.getAttribute("class");
      const value = document.createElement("b");
      value.textContent = values[index].replace("-", "\u2212");
      line.append(series.dataset.name + " ", value, steps[index] === at ? "" : ` (step ${steps[index]})`);
      tip.append(line);
    }
    tip.hidden = false;
    const beside = event.pageX + 16, room = document.documentElement.clientWidth - tip.offsetWidth - 8;
    tip.style.left = Math.max(4, Math.min(beside, room)) + "px";
    tip.style.top = box.bottom + window.scrollY + 4 + "px";
  });
  const hide = () => { tip.hidden = true; rule.remove(); };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("pointercancel", hide);
}

for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const shown = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", shown);
    for (const series of document.querySelectorAll(`.plot .r${button.dataset.run}`)) {
      series.style.display = shown ? "" : "none";
    }
  });
}
