// Puts a live figure in the place of each static picture.
(() => {
  const config = JSON.parse(document.getElementById("vega-config").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;

  // A phone: shorter names, one column of the legend, no numbers in cells that are too small.
  function fitted(spec, width) {
    spec.width = "container";
    spec.autosize = { type: "fit-x", contains: "padding" };
    if (width >= 560) return spec;
    const x = spec.encoding && spec.encoding.x;
    const columns = x && x.scale && Array.isArray(x.scale.domain) ? x.scale.domain.length : 0;
    if (columns) {
      x.axis.labelAngle = -40;
      if ((width - 120) / columns < 34) {
        spec.layer = spec.layer.filter((layer) => layer.mark.type !== "text");
      }
    }
    const shorten = (part) => {
      for (const [name, value] of Object.entries(part)) {
        if (name === "labelLimit") part[name] = Math.min(value, 125);
        else if (value && typeof value === "object" && name !== "data") shorten(value);
      }
    };
    shorten(spec);
    return spec;
  }

  async function show(figure) {
    const chart = figure.querySelector(".chart"), still = figure.querySelector(".static");
    const spec = JSON.parse(figure.querySelector("script").textContent);
    const width = figure.clientWidth;
    const own = structuredClone(config);
    if (width < 560) {
      own.axis.labelLimit = 125;
      own.axis.labelFontSize = own.axis.titleFontSize = 11;
      own.legend.columns = 1;
      own.legend.labelLimit = width - 90;
    }
    try {
      await vegaEmbed(chart, fitted(spec, width), {
        mode: "vega-lite",
        renderer: "svg",
        config: own,
        tooltip: { theme: dark ? "dark" : "light" },
        actions: { export: true, source: false, compiled: false, editor: false },
      });
      still.hidden = true;
      figure.dataset.live = "yes";
    } catch (error) {
      chart.replaceChildren();
      figure.dataset.live = String(error);
    }
  }

  // One after another, so that the page stays usable; those that are folded when they unfold.
  async function showAll() {
    for (const figure of document.querySelectorAll("figure.live")) {
      if (figure.dataset.live || figure.closest("details:not([open])")) continue;
      figure.dataset.live = "no";
      await show(figure);
    }
  }
  addEventListener("load", showAll);
  document.addEventListener("toggle", showAll, true);
})();
