"""How the page of a comparison looks."""

STYLE = """
:root { --ink: #111827; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --back: #f6f7f9;
  --bad: #b42318; --good: #18794e; --accent: #1f4e9c; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 12px; }
p { margin: 0 0 10px; }
.soft, figcaption, caption, small { color: var(--soft); }
.verdict { font-size: 17px; margin: 16px 0; max-width: 70ch; }
section, .tile { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; }
section { padding: 20px 22px; margin: 18px 0; overflow-x: auto; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; }
.tile { flex: 1 1 150px; padding: 14px 16px; }
.tile b { display: block; font-size: 24px; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 13px; display: block; }
.tile.bad b, td.bad { color: var(--bad); } .tile.good b, td.good { color: var(--good); }
.warning { border-left: 4px solid #b7791f; background: #fdf6e3; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 6px 10px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { font-weight: 600; } thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
td small { display: block; font-size: 12px; white-space: nowrap; }
td:first-child small { max-width: 46ch; white-space: normal; }
caption { caption-side: bottom; text-align: left; padding-top: 8px; font-size: 13px; }
.matrix { width: auto; font-size: 12px; }
.matrix th, .matrix td { padding: 0; border: 1px solid var(--line); text-align: center; min-width: 30px; height: 28px;
  vertical-align: middle; }
.matrix tbody th { text-align: right; padding: 0 8px; font-weight: 400; white-space: nowrap; }
.matrix thead th { font-weight: 400; vertical-align: bottom; height: auto; padding: 6px 0; border: 0; }
.matrix thead span { writing-mode: vertical-rl; transform: rotate(180deg); white-space: nowrap; }
.gallery { display: flex; flex-wrap: wrap; gap: 14px; }
figure { margin: 0; } figure.curve img { width: 100%; height: auto; }
.gallery figure { flex: 1 1 170px; max-width: 240px; border: 1px solid var(--line);
  border-radius: 8px; padding: 10px; font-size: 13px; }
.gallery img { width: 100%; height: 150px; object-fit: contain; background: var(--back); border-radius: 4px; }
.gallery figcaption { color: var(--ink); overflow-wrap: anywhere; }
.was { color: var(--good); } .now { color: var(--bad); }
.bar { display: inline-block; height: 8px; background: var(--bad); border-radius: 2px; vertical-align: middle;
  margin-right: 8px; opacity: 0.75; }
dl { display: grid; grid-template-columns: minmax(130px, auto) 1fr; gap: 4px 18px; margin: 0; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
@media print { body { background: none; } section { break-inside: avoid; } }
"""
