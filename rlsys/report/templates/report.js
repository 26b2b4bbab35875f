// Values under the pointer, of a curve and of a token, and by what tokens are coloured.
// A finger leaves when it is lifted: what it has touched stays shown until it touches something else.
const unless_finger = (act) => (event) => { if (event.pointerType !== "touch") act(); };

for (const box of document.querySelectorAll(".plot")) {
  const svg = box.querySelector("svg"), tip = box.querySelector(".tip"), rule = box.querySelector(".rule");
  const points = JSON.parse(box.dataset.hover), labels = JSON.parse(box.dataset.labels), width = svg.viewBox.baseVal.width;
  let at = points.length - 1;
  const hide = () => { tip.hidden = true; rule.setAttribute("visibility", "hidden"); };
  const show = (chosen) => {
    at = Math.max(0, Math.min(points.length - 1, chosen));
    const [x, step, values] = points[at], frame = svg.getBoundingClientRect(), left = x / width * frame.width;
    for (const end of ["x1", "x2"]) rule.setAttribute(end, x);
    rule.setAttribute("visibility", "visible");
    tip.textContent = [step, ...labels.flatMap((label, i) => values[i] === "" ? [] : [label + "  " + values[i]])].join("\n");
    tip.hidden = false;
    const wanted = left > frame.width / 2 ? left - tip.offsetWidth - 10 : left + 10;
    tip.style.left = Math.max(0, Math.min(frame.width - tip.offsetWidth, wanted)) + "px";
  };
  const point = (event) => {
    const frame = svg.getBoundingClientRect(), x = (event.clientX - frame.left) / frame.width * width;
    let best = 0;
    points.forEach((one, i) => { if (Math.abs(one[0] - x) < Math.abs(points[best][0] - x)) best = i; });
    show(best);
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("pointerleave", unless_finger(hide));
  box.addEventListener("blur", hide);
  document.addEventListener("pointerdown", (event) => { if (!box.contains(event.target)) hide(); });
  box.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) { event.preventDefault(); show(tip.hidden ? at : at + by); }
  });
}

const words = document.getElementById("token-tip");
let marked = null;
const leave = () => { if (marked) marked.classList.remove("at"); marked = null; words.hidden = true; };
const enter = (token) => {
  if (marked !== token) leave();
  marked = token;
  token.classList.add("at");
  words.textContent = token.dataset.n;
  words.hidden = false;
  const frame = token.getClientRects()[0] || token.getBoundingClientRect();
  const below = frame.bottom + 6 + words.offsetHeight < window.innerHeight;
  words.style.top = scrollY + (below ? frame.bottom + 6 : frame.top - 6 - words.offsetHeight) + "px";
  words.style.left = Math.max(6, Math.min(window.innerWidth - words.offsetWidth - 6, frame.left)) + "px";
};
for (const box of document.querySelectorAll(".tokens")) {
  const point = (event) => { const token = event.target.closest(".t"); if (token) enter(token); else leave(); };
  box.addEventListener("pointerover", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("pointerleave", unless_finger(leave));
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    event.preventDefault();
    const all = [...box.querySelectorAll(".t")], now = all.indexOf(marked);
    const next = now < 0 ? 0 : Math.max(0, Math.min(all.length - 1, now + (event.key === "ArrowRight" ? 1 : -1)));
    all[next].scrollIntoView({ block: "nearest", inline: "nearest" });
    enter(all[next]);
  });
}
document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".tokens")) leave(); });
addEventListener("scroll", (event) => { if (event.target !== document) leave(); }, { passive: true, capture: true });

for (const choice of document.querySelectorAll("input[name=by]")) {
  const take = () => { if (choice.checked) document.body.dataset.by = choice.value; };
  choice.addEventListener("change", take);
  take();
}
