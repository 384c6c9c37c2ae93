// What can be measured of a page's looks: whether it is wider than its window, and which words stand out too little from what is behind them.
() => {
  const numbers = (color) => color.match(/[\d.]+/g).map(Number);
  const over = (front, back) => front.slice(0, 3).map((value, n) => value * (front[3] ?? 1) + back[n] * (1 - (front[3] ?? 1)));
  const luminance = (color) => {
    const [r, g, b] = color.map((value) => { const c = value / 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    if (!element) return numbers(getComputedStyle(document.documentElement).colorScheme.includes("dark") ? "rgb(0,0,0)" : "rgb(255,255,255)");
    const own = numbers(getComputedStyle(element).backgroundColor);
    return (own[3] ?? 1) === 1 ? own : over(own, behind(element.parentElement));
  };
  const faint = [];
  for (const element of document.body.querySelectorAll("*")) {
    const words = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE).map((node) => node.textContent.trim()).join(" ").trim();
    const box = element.getBoundingClientRect();
    if (!words || !box.width || !box.height || element.closest("svg") || element.disabled || getComputedStyle(element).visibility === "hidden") continue;
    const back = behind(element);
    const [a, b] = [luminance(over(numbers(getComputedStyle(element).color), back)), luminance(back)].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) faint.push(`${ratio.toFixed(2)} <${element.localName} class="${element.className}"> ${words.slice(0, 60)}`);
  }
  const wide = [];
  if (document.documentElement.scrollWidth > innerWidth) {
    for (const element of document.body.querySelectorAll("*")) {
      if (element.getBoundingClientRect().right > innerWidth + 1 && !element.parentElement.closest(".scroll, pre")) {
        wide.push(`<${element.localName} class="${element.className}"> ${element.textContent.trim().slice(0, 60)}`);
      }
    }
  }
  const unnamed = [...document.querySelectorAll("input, select, textarea, button, a[href], svg[role=img]")].filter((element) => element.type !== "hidden"
    && !element.labels?.length && !element.textContent.trim() && !element.getAttribute("aria-label")).map((element) => element.outerHTML.slice(0, 100));
  return { faint, wide, unnamed, headings: document.querySelectorAll("h1").length };
}
