// What does not stand out from its paper as WCAG 2.2 AA asks: a line for each.
(() => {
  const brush = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    brush.clearRect(0, 0, 1, 1);
    brush.fillStyle = colour;
    brush.fillRect(0, 0, 1, 1);
    return [...brush.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
  };
  const luminance = (colour) => {
    const [r, g, b] = colour.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const paper = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3] === 1) return colour;
    }
    return rgba(getComputedStyle(document.documentElement).backgroundColor);
  };
  const ratio = (a, b) => {
    const [high, low] = [luminance(a), luminance(b)].sort((x, y) => y - x);
    return (high + 0.05) / (low + 0.05);
  };
  const found = [];
  const look = (element, colour, least, what) => {
    const seen = ratio(rgba(colour), paper(element));
    if (seen < least) found.push(`${seen.toFixed(2)} < ${least}: ${what}`);
  };
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const text = texts.currentNode.data.trim();
    const element = texts.currentNode.parentElement;
    if (!text || !element.checkVisibility() || element.closest("script, style, .unseen")) continue;
    const style = getComputedStyle(element);
    look(element, element.closest("svg") ? style.fill : style.color, 4.5, `${element.tagName} ${text}`);
  }
  for (const element of document.querySelectorAll("input, select, button")) {
    const style = getComputedStyle(element);
    if (!element.checkVisibility() || style.borderTopWidth === "0px") continue;
    look(element.parentElement, style.borderTopColor, 3, `the edge of ${element.tagName}`);
  }
  for (const mark of document.querySelectorAll("svg .role-mark path, svg .role-legend-symbol path")) {
    const { fill, stroke } = getComputedStyle(mark); // an outline is enough
    const seen = [fill, stroke].filter((colour) => colour !== "none").map((c) => ratio(rgba(c), paper(mark)));
    if (Math.max(...seen) < 3) found.push(`${seen} < 3: a mark, ${fill}, ${stroke}`);
  }
  return [...new Set(found)];
})()
