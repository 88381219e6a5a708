"""The look of a report: light and dark, on a screen and on paper."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --ink: #1f2933; --soft: #5b6673; --line: #e2e6ea; --tint: #f6f8fa; --accent: #2b6cb0;
}
@media (prefers-color-scheme: dark) {
  :root { --page: #14181d; --ink: #e4e8ec; --soft: #9aa5b1; --line: #2c343d; --tint: #1b2128; --accent: #7fb2e5; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 60rem; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0 0 0.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3.2rem 0 0.5rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 0.4rem; }
p { max-width: 44rem; margin: 0.4rem 0 1rem; }
.lead, .note, dt, figcaption { color: var(--soft); }
.lead { font-size: 1.05rem; margin-bottom: 1.6rem; }
.note, figcaption { font-size: 0.85rem; }
dl {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: 0.9rem 1.5rem; margin: 0 0 1rem;
  padding: 1.1rem 1.25rem; background: var(--tint); border: 1px solid var(--line); border-radius: 10px;
}
dt { font-size: 0.72rem; text-transform: uppercase; letter-spacing: 0.06em; }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
@media (min-width: 40rem) { .wide { grid-column: span 2; } }
.scroll { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: baseline; padding: 0.45rem 1.1rem 0.45rem 0; }
th { font-size: 0.72rem; text-transform: uppercase; letter-spacing: 0.06em; color: var(--soft); font-weight: 600; }
thead th { border-bottom: 2px solid var(--line); }
tbody { border-bottom: 1px solid var(--line); }
tbody tr + tr td { padding-top: 0; }
td { padding-right: 1.4rem; }
td:nth-child(1) { overflow-wrap: anywhere; min-width: 13rem; }
td:nth-child(2) { font-weight: 650; white-space: nowrap; }
td:nth-child(n + 3) { color: var(--soft); }
td:nth-child(4) { white-space: nowrap; padding-right: 0; }
.where { display: block; color: var(--soft); font-size: 0.8rem; }
figure { margin: 1rem 0 0; }
.plate { padding: 0.75rem; background: #ffffff; border: 1px solid var(--line); border-radius: 10px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { margin-top: 0.6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin-top: 3.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
summary { cursor: pointer; font-weight: 600; color: var(--accent); }
pre {
  margin: 0; padding: 0.9rem 1rem; overflow-x: auto; background: var(--tint); border: 1px solid var(--line);
  border-radius: 8px; font: 0.78rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
@media print {
  :root { --page: #ffffff; --ink: #000000; --soft: #444444; --line: #cccccc; --tint: #ffffff; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; margin-top: 1.6rem; }
  section.result, figure, dl, tbody { break-inside: avoid; }
  table { font-size: 8.5pt; }
  .where { font-size: 7pt; }
  .plate { border: 0; padding: 0; }
  figure img { max-height: 22cm; }
}
"""
