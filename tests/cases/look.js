// Run on the report's page: which of VISIBLE have no size, the text of every figure with the pointer at step 20, the two
// themes' background, the path of the loss.
const VISIBLE = [
  "#curves figure svg .line",
  ".legend li",
  "table.confusion td",
  "table.controls svg .bar",
  "header pre",
  "svg text",
  "#rollouts .strip img",
  ".tokens i.p3",
  ".question",
  "#data td svg .bar",
  ".example img",
];
const boxes = selector => Array.from(document.querySelectorAll(selector), e => e.getBoundingClientRect());
const result = { hidden: VISIBLE.filter(s => !boxes(s).some(box => box.width > 10 && box.height > 6)) };
const loss = charts.find(c => c.svg.closest("figure").innerText.includes("loss"));
const box = loss.svg.getBoundingClientRect();
const at = { clientX: (loss.x(20) + 1) / WIDTH * box.width + box.left, clientY: box.top + 50 };
loss.svg.dispatchEvent(new PointerEvent("pointermove", at));
result.hover = Array.from(document.querySelectorAll("figure"), f => f.innerText);
const colour = () => getComputedStyle(document.body).backgroundColor;
result.themes = [colour(), (document.getElementById("theme").click(), colour())];
result.loss = loss.svg.querySelector(".line").getAttribute("d");
document.documentElement.dataset.result = JSON.stringify(result);
