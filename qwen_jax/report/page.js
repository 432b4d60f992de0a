// SPDX-License-Identifier: Apache-2.0
// Values under the pointer, written into each plot's caption.
for (const figure of document.querySelectorAll("figure[data-plot]")) {
  const curves = JSON.parse(figure.dataset.plot);
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const outputs = figure.querySelectorAll("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
    let near = null;
    curves.forEach((curve, i) => {
      const spot = curve.reduce((a, b) =>
        Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a);
      outputs[i].textContent = spot[1] + " at " + spot[0];
      if (!near || Math.abs(spot[2] - x) < Math.abs(near[2] - x)) near = spot;
    });
    cursor.setAttribute("d", "M" + near[2] + " 10V194");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("d", "");
    outputs.forEach(output => { output.textContent = ""; });
  });
}
