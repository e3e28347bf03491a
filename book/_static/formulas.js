// A formula inside a line cannot be broken. One that is wider than its line, on a phone, scrolls by itself.
function fitFormulas() {
  for (const formula of document.querySelectorAll("article mjx-container:not([display])")) {
    formula.classList.remove("wide");
    const line = formula.parentElement.closest("p, li, td, th, dd, div, section");
    if (formula.getBoundingClientRect().width > line.clientWidth) formula.classList.add("wide");
  }
}
window.addEventListener("load", () => window.MathJax?.startup?.promise.then(fitFormulas));
window.addEventListener("resize", fitFormulas);
